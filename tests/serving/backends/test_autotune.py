"""`--graph auto`: what is chosen by a machine of known speed, what is remembered, and once by this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.backends import autotune, tuning_cache
from serving.backends.autotune import Autotuner, Setting, autotuner
from serving.bundle import Bundle, open_bundle
from serving.cli import run
from serving.engine.config import EngineConfig
from serving.entrypoints.engine_loader import EngineLoader
from serving.errors import BundleError, InputError
from serving.model import load
from serving.support import cores
from tests.closed_form import write_bundle
from tests.tiny_build import Fails

GRAPHS = ("int4", "fp32", "int8")  # As in a manifest: in any order.


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a machine of 4 cores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "thread_counts", lambda replicas: [4, 2, 1][replicas > 1 :])
    return tmp_path / "cache/gpt2-bundle/autotune"


def bundle_of(folder: Path, name: str = "tiny", **statuses: str) -> Bundle:
    """A bundle with graphs in three precisions, and a certificate that says `statuses` of them."""
    variants = {f"ort/{precision}": {"status": status} for precision, status in statuses.items()}
    write_bundle(folder, name, {"verification.json": json.dumps({"variants": variants}).encode()})
    opened = open_bundle(folder)
    fp32 = opened.manifest.graphs["ort/fp32"]
    graphs = {f"ort/{each}": dataclasses.replace(fp32, precision=each) for each in GRAPHS}
    manifest = dataclasses.replace(opened.manifest, graphs=opened.manifest.graphs | graphs)
    return dataclasses.replace(opened, manifest=manifest)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_of(tmp_path / "bundle", int8="verified", int4="verified")


class Machine:
    """A machine of known speed: tokens/s of each graph on 4 threads, by threads, and seconds for each measurement."""

    def __init__(self, fp32: float = 100, int8: float = 300, int4: float = 250, seconds: float = 1.0) -> None:
        self.rates = {"ort/fp32": fp32, "ort/int8": int8, "ort/int4": int4}
        self.share = {4: 1.0, 2: 0.6, 1: 0.3}
        self.seconds, self.now = seconds, 0.0
        self.measured: list[Setting] = []
        self.said: list[str] = []

    def rate(self, bundle: Bundle, graph: str, threads: int, batch_size: int) -> float:
        self.now += self.seconds
        self.measured.append(Setting(graph, threads))
        if not self.rates[graph]:
            raise BundleError("a kernel is missing")
        return self.rates[graph] * self.share[threads]

    def tuner(self, lowest: str = "fp32", **options: Any) -> Autotuner:
        return Autotuner(lowest, say=self.said.append, measure=self.rate, clock=lambda: self.now, **options)


@pytest.mark.parametrize(
    ("lowest", "wanted", "measured"),
    [("fp32", "ort/fp32", 3), ("fp16", "ort/fp32", 3), ("int8", "ort/int8", 4), ("int4", "ort/int8", 5)],
)
def test_no_precision_below_the_accepted_one_is_measured(
    bundle: Bundle, lowest: str, wanted: str, measured: int
) -> None:
    machine = Machine()
    assert machine.tuner(lowest).choose(bundle) == Setting(wanted, 4)
    assert len(machine.measured) == measured and machine.measured[0] == Setting("ort/fp32", 4)
    assert {setting.graph for setting in machine.measured} <= {"ort/fp32", wanted, f"ort/{lowest}"}
    assert f"auto: {wanted} with 4 threads; tokens/s at batch size 1: ort/fp32 with 4 threads 100, " in machine.said[-1]


def test_only_what_the_certificate_verifies_is_chosen(tmp_path: Path) -> None:
    machine = Machine(int8=900, int4=900)
    bundle = bundle_of(tmp_path / "some", int8="too few tokens")
    assert machine.tuner("int4").choose(bundle) == Setting("ort/fp32", 4)
    assert {setting.graph for setting in machine.measured} == {"ort/fp32"}
    assert "left out: ort/int8 (too few tokens), ort/int4 (not in the certificate)" in machine.said[-1]
    for number, certificate in enumerate([b"", b"[]", b'{"variants": {"ort/int8": 1}}', b'{"variants": []}']):
        write_bundle(tmp_path / str(number), extra={"verification.json": certificate})
        opened = open_bundle(tmp_path / str(number))
        changed = dataclasses.replace(
            opened, manifest=dataclasses.replace(opened.manifest, graphs=bundle.manifest.graphs)
        )
        assert machine.tuner("int4").options(changed)["graph"] == ["ort/fp32"]


def test_a_lower_precision_has_to_be_clearly_faster(bundle: Bundle) -> None:
    assert Machine(int8=104, int4=104).tuner("int4", threads=4).choose(bundle).graph == "ort/fp32"
    assert Machine(int8=106, int4=110).tuner("int4", threads=4, batch_size=2).choose(bundle).graph == "ort/int8"
    assert Machine(int8=106, int4=112).tuner("int4", threads=4, batch_size=3).choose(bundle).graph == "ort/int4"


def test_threads_are_compared_on_the_chosen_graph_and_then_the_graphs_again(bundle: Bundle) -> None:
    machine = Machine(int8=300, int4=400)
    machine.share = {4: 0.1, 2: 0.5, 1: 0.9}
    assert machine.tuner("int4").choose(bundle) == Setting("ort/int4", 1)
    order = [(setting.graph.removeprefix("ort/"), setting.threads) for setting in machine.measured]
    assert order == [
        ("fp32", 4), ("int8", 4), ("int4", 4), ("int4", 2), ("int4", 1), ("fp32", 1), ("int8", 1)
    ]  # fmt: skip
    fewer = Machine()
    assert fewer.tuner("int4", replicas=2, batch_size=9).choose(bundle) == Setting("ort/int8", 2)


def test_the_measurements_end_in_time(bundle: Bundle) -> None:
    machine = Machine(seconds=6.0)
    assert machine.tuner("int4").choose(bundle) == Setting("ort/int8", 4)
    assert machine.now <= autotune.SECONDS and len(machine.measured) == 3
    assert "no time for 2, 1" in machine.said[-1]
    slow = Machine(seconds=30.0)
    assert slow.tuner("int4", batch_size=2).choose(bundle) == Setting("ort/fp32", 4)
    assert len(slow.measured) == 1 and "no time for ort/int8, ort/int4, 2, 1" in slow.said[-1]
    # It would not end in time the next time either.
    assert slow.tuner("int4", batch_size=2).choose(bundle) == Setting("ort/fp32", 4)
    assert len(slow.measured) == 1


def test_a_graph_that_does_not_run_here_is_passed_over(bundle: Bundle) -> None:
    machine = Machine(int8=0)
    assert machine.tuner("int4").choose(bundle).graph == "ort/int4"
    assert any("ort/int8 with 4 threads does not run here: a kernel is missing" in line for line in machine.said)
    with pytest.raises(BundleError, match="a kernel is missing"):
        Machine(fp32=0).tuner("int4", batch_size=2).choose(bundle)


def test_what_was_measured_is_remembered_by_machine_and_bundle(
    tmp_path: Path, bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    ask: Callable[..., Setting] = lambda which=bundle, **options: machine.tuner("int4", **options).choose(which)  # noqa: E731
    assert ask() == Setting("ort/int8", 4)
    measured = len(machine.measured)
    (entry,) = cache.iterdir()
    assert str(entry) in machine.said[-1]
    assert ask() == Setting("ort/int8", 4) and len(machine.measured) == measured
    assert re.search(r"auto: ort/int8 with 4 threads; .*; remembered from \d{4}-\d\d-\d\d$", machine.said[-1])
    # Another batch size, thread count, bundle, processor, number of cores or ONNX Runtime is another question.
    changes: list[Callable[[], object]] = [
        lambda: ask(batch_size=16),
        lambda: ask(threads=2),
        lambda: ask(bundle_of(tmp_path / "other", "other", int8="verified", int4="verified")),
        lambda: monkeypatch.setattr(autotune, "cpu_model", lambda: "another"),
        lambda: monkeypatch.setattr(autotune, "usable_cores", lambda: 1000),
        lambda: monkeypatch.setattr("onnxruntime.__version__", "0.1"),
    ]
    for change in changes:
        before = len(machine.measured)
        if change() is None:
            ask()
        assert len(machine.measured) > before
    assert len(list(cache.iterdir())) == 1 + len(changes)


def damaged(entry: Path) -> dict[str, Callable[[], object]]:
    """Ways in which an entry is not what was written."""
    text = entry.read_text()
    table = json.loads(text)

    def stored(**changes: Any) -> str:
        return json.dumps(table | {"answer": table["answer"] | changes})

    def rows(**changes: Any) -> str:
        (first, *rest) = table["answer"]["rates"]
        setting = first["setting"] | {key: value for key, value in changes.items() if key in first["setting"]}
        return stored(rates=[first | changes | {"setting": setting}, *rest])

    def gone(make: Callable[[], object]) -> Callable[[], object]:
        return lambda: (entry.unlink(), make())

    write = entry.write_text
    return {
        "cut": lambda: write(text[: len(text) // 2]),
        "empty": lambda: write(""),
        "no table": lambda: write("[1]"),
        "deep": lambda: write("[" * 60_000),
        "long": lambda: write(text + " " * (1 << 16)),
        "bytes": lambda: entry.write_bytes(b"\xff\xfe\x00"),
        "another question": lambda: write(text.replace('"batch_size": 1', '"batch_size": 2')),
        "another graph": lambda: write(rows(graph="ort/fp64")),
        "another thread count": lambda: write(rows(threads=7)),
        "a truth for a number": lambda: write(rows(threads=True)),
        "no rate": lambda: write(rows(tokens_per_second="fast")),
        "an endless rate": lambda: write(rows(tokens_per_second="inf")),
        "a huge rate": lambda: write(rows(tokens_per_second=10**400)),
        "a field more": lambda: write(stored(rates=[{"setting": {"graph": "ort/fp32", "threads": 4, "x": 1}}])),
        "nothing measured": lambda: write(stored(rates=[])),
        "no date": lambda: write(stored(measured="\x1b[2J")),
        "no answer": lambda: write(json.dumps({"question": table["question"]})),
        "a pipe": gone(lambda: os.mkfifo(entry)),
        "a link": gone(lambda: entry.symlink_to("/dev/zero")),
        "a folder": gone(entry.mkdir),
    }


def test_a_damaged_entry_is_measured_again(bundle: Bundle, cache: Path) -> None:
    machine = Machine()
    machine.tuner("int4").choose(bundle)
    (entry,) = cache.iterdir()
    text, count = entry.read_text(), len(machine.measured)
    for what, damage in damaged(entry).items():
        damage()
        machine.measured.clear()
        assert machine.tuner("int4").choose(bundle) == Setting("ort/int8", 4), what
        assert len(machine.measured) == count, what
        if what == "a folder":
            assert "not remembered (Is a directory)" in machine.said[-1]
        else:
            whole = json.loads(entry.read_text())
            assert whole["answer"]["rates"] == json.loads(text)["answer"]["rates"], what
    assert list(cache.iterdir()) == [entry], "a draft is left"


def test_where_nothing_can_be_written_the_answer_stands(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.tuner("int4").choose(bundle) == Setting("ort/int8", 4)
    assert "measured, not remembered (" in machine.said[-1]
    # A relative path is ignored, as the specification says.
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    machine.tuner("int4").choose(bundle)
    assert len(list((tmp_path / "home/.cache/gpt2-bundle/autotune").iterdir())) == 1

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert machine.tuner("int4").choose(bundle) == Setting("ort/int8", 4)
    assert "not remembered (there is no home folder)" in machine.said[-1]


def test_entries_that_are_written_at_once_are_whole(cache: Path) -> None:
    question, answers = {"schema": 0}, [[number] * 2000 for number in range(4)]
    seen: list[Any] = []

    def write(answer: list[int]) -> None:
        for _ in range(40):
            tuning_cache.write(question, answer)
            seen.append(tuning_cache.read(question))

    threads = [threading.Thread(target=write, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160 and all(each in answers for each in seen)
    assert len(list(cache.iterdir())) == 1


def test_a_next_version_is_not_measured_while_the_first_one_serves(bundle: Bundle, tmp_path: Path) -> None:
    machine = Machine()
    tuner = machine.tuner("int4")
    tuner.choose(bundle)
    measured = len(machine.measured)
    assert tuner.choose(bundle_of(tmp_path / "2", "two", int8="verified")) == Setting("ort/int8", 4)
    assert tuner.choose(bundle_of(tmp_path / "3", "three", int4="verified")) == Setting("ort/fp32", 4)
    assert len(machine.measured) == measured
    assert machine.said[-1] == "auto: ort/fp32 with 4 threads, as measured for the version before"


def test_what_is_asked_for(bundle: Bundle, bundle_folder: Path, fails: Fails) -> None:
    assert autotuner(None) is None and autotuner("ort/fp32") is None
    for graph, words in [("auto:int9", "did you mean 'int8'"), ("auto:", "no precision ''")]:
        with pytest.raises(InputError, match=words):
            autotuner(graph)
    with pytest.raises(InputError, match="batch_size is 0; it must be an integer from 1 to 1024"):
        load(bundle_folder, graph="auto", batch_size=0)
    plain = dataclasses.replace(bundle.manifest, graphs={"ort/int8": bundle.manifest.graphs["ort/int8"]})
    with pytest.raises(InputError, match="no fp32 graph"):
        Machine().tuner("int8").choose(dataclasses.replace(bundle, manifest=plain))
    generate = ["generate", str(bundle_folder), "hi", "--graph", "auto:int8"]
    fails([*generate, "--device", "cuda"], 2, "ONNX Runtime on the processor")
    fails([*generate, "--runtime", "tensorflow"], 2, "ONNX Runtime on the processor")
    fails([*generate[:3], "--threads", "2", "--runtime", "tensorflow"], 2, "finds its threads by itself")
    serve = ["serve", str(bundle_folder), "--port", "0", "--graph"]
    fails([*serve, "auto:int9"], 2, "did you mean 'int8'")
    fails([*serve, "auto", "--device", "cpu,cuda:0", "--replicas", "2"], 2, "ONNX Runtime on the processor")


def test_this_machine_chooses_for_a_real_bundle(
    real_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    monkeypatch.setattr(autotune, "thread_counts", lambda replicas: [2, 1])
    expected = load(real_bundle).generate("ab", max_new_tokens=6, ignore_eos=True)
    command = ["generate", str(real_bundle), "ab", "--max-new-tokens", "6", "--ignore-eos", "--graph"]
    assert run([*command, "auto:int8"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{expected.text}\n"
    assert "auto: measuring the fastest of graphs ort/fp32 and thread counts 2, 1 here" in err
    assert re.search(r"auto: ort/fp32 with [12] threads?; tokens/s at batch size 1: ort/fp32 with 2 threads \d", err)
    (entry,) = cache.iterdir()

    def never(*arguments: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(autotune, "generation_rate", never)
    assert load(real_bundle, graph="auto:int8").generate("ab", max_new_tokens=6, ignore_eos=True) == expected
    assert run([*command, "auto", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{expected.text}\n", "auto: ort/fp32 with 1 thread, the only candidate\n")
    assert list(cache.iterdir()) == [entry]


def test_the_engine_runs_what_was_chosen(real_bundle: Path) -> None:
    machine = Machine()
    machine.share = {4: 0.1, 2: 0.5, 1: 0.9}
    tuner = machine.tuner(batch_size=3)
    loader = EngineLoader(config=EngineConfig(slots=3), tuner=tuner)
    opened = open_bundle(real_bundle)
    plain = EngineLoader(config=EngineConfig(slots=3))
    assert loader.estimate(opened) == plain.estimate(opened)
    engine: Any = loader.open(opened, None)  # type: ignore[arg-type]
    try:
        assert engine.config.threads == 1 and len(machine.measured) == 3
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"a/b/cpu.max": "150000 100000\n", "cpu.max": "max 100000\n"}, 2),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 1),
        ({"a/b/cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"a/b/cpu.max": "1 0\n"}, None),
        ({"a/b/cpu.max": "\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text("4:memory:/x\n0::/a/b\n")
    monkeypatch.setattr(cores, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "_OWN_GROUP", tmp_path / "own")
    assert cores.core_quota() == quota


def test_thread_counts_begin_with_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(logical: int, physical: int, quota: int | None) -> None:
        monkeypatch.setattr(cores, "usable_cores", lambda: logical)
        monkeypatch.setattr(cores, "physical_cores", lambda: physical)
        monkeypatch.setattr(cores, "core_quota", lambda: quota)

    machine(2, 2, None)
    assert cores.thread_counts() == [2, 1] and cores.thread_counts(3) == [1]
    machine(128, 64, None)
    assert cores.thread_counts() == [64, 128, 32, 16, 8] and cores.thread_counts(4) == [16, 32, 8, 4, 2]
    machine(64, 64, 3)
    assert cores.thread_counts() == [3, 64, 1]
