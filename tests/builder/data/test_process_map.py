"""Worker processes: results in order, errors as they were raised, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.data.process_map import map_in_order
from serving.errors import GPT2BundleError, InputError

ROOT = Path(__file__).parents[3]


def square(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 5 == 0 else 0)
    return number**2, os.getpid()


def refuse_seven(number: int) -> int:
    if number == 7:
        raise InputError("seven")
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def note_and_wait(folder: Path, number: int) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(60)
    return number


def broken_off() -> Iterator[int]:
    yield from range(30)
    raise InputError("line 31")


def test_results_come_in_order_and_little_work_starts_no_process() -> None:
    results = list(map_in_order(square, iter(range(40)), 3))
    assert [value for value, _ in results] == [number**2 for number in range(40)]
    assert os.getpid() not in {pid for _, pid in results}
    assert {pid for _, pid in map_in_order(square, range(8), 3)} == {os.getpid()}
    assert {pid for _, pid in map_in_order(square, range(40), 1)} == {os.getpid()}


def test_an_error_of_the_work_or_of_what_it_reads_is_raised_as_it_is() -> None:
    with pytest.raises(InputError, match="seven"):
        list(map_in_order(refuse_seven, range(40), 2))
    with pytest.raises(InputError, match="line 31"):
        list(map_in_order(refuse_seven, (number for number in broken_off() if number != 7), 2))


def test_a_worker_that_is_killed_is_one_clear_error() -> None:
    with pytest.raises(GPT2BundleError, match="worker process was killed"):
        list(map_in_order(die, range(40), 2))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom functools import partial\n"
        "from builder.data.process_map import map_in_order\n"
        "from tests.builder.data.test_process_map import note_and_wait\n"
        "list(map_in_order(partial(note_and_wait, Path(sys.argv[1])), range(40), 2))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) as process:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        process.kill()
    pids = [path.name for path in tmp_path.iterdir()]
    wait_for(lambda: not any(Path("/proc", pid).exists() for pid in pids))


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
