"""Several workers: what TF_CONFIG may say, who is let in, sums over the ring, and how the others learn of an end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.recipe import Recipe, TrainingRecipe
from builder.stages.workers import follow, joined_workers
from builder.training.cluster import Cluster, check_batch, read_cluster
from builder.training.workers import Workers
from serving.errors import GPT2BundleError, InputError, TrainingError
from tests.tiny_build import Fails

PAIR = {"worker": ["a:1", "b:2"]}


def config(cluster: Any, kind: Any = "worker", index: Any = 0) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def test_tf_config_names_the_workers_and_this_one() -> None:
    for environment in ({}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}, config({"worker": ["a:1"]})):
        assert read_cluster(environment) is None, environment
    # Ray has workers alone, of which the first is the chief; Kubeflow may have a chief, and says more.
    assert read_cluster(config(PAIR, "worker", 1)) == Cluster(("worker 0", "worker 1"), (("a", 1), ("b", 2)), 1)
    kubeflow = {
        "cluster": {"worker": ["gpt2-worker-0.models.svc:2222"], "chief": ["gpt2-chief-0.models.svc:2222"]},
        "task": {"type": "worker", "index": 0},
        "environment": "cloud",
    }
    cluster = read_cluster({"TF_CONFIG": json.dumps(kubeflow)})
    assert cluster is not None
    assert (cluster.names, cluster.rank) == (("chief", "worker 0"), 1)
    assert cluster.describe(0) == "chief (gpt2-chief-0.models.svc:2222)"
    cluster = read_cluster(config({"worker": ["[::1]:5", "[::1]:6"]}))
    assert cluster is not None and cluster.addresses[0] == ("::1", 5)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TF_CONFIG": "worker"}, "TF_CONFIG is not JSON"),
        ({"TF_CONFIG": "[" * 100_000}, "TF_CONFIG is not JSON"),
        ({"TF_CONFIG": "[]"}, "no object 'cluster'"),
        ({"TF_CONFIG": '{"cluster": 3}'}, "no object 'cluster'"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:2"]}}'}, "task {} is not one of"),
        (config({"worker": "a:1"}), "cluster.worker is not a list"),
        (config({"worker": ["a:1", "b"]}), "'b' in cluster.worker is not HOST:PORT"),
        (config({"worker": ["a:1", "b:0"]}), "'b:0' in cluster.worker"),
        (config({"worker": ["a:1", "b:65536"]}), "'b:65536' in cluster.worker"),
        (config({"worker": ["a:1", "b:" + "9" * 5000]}), "in cluster.worker is not HOST:PORT"),
        (config({"worker": ["a:1", 5]}), "5 in cluster.worker"),
        (config({"worker": ["a:1", "a:1"]}), "a:1 twice"),
        (config({"worker": ["a:1"], "ps": ["b:2"]}), "has the job 'ps'"),
        (config({"chief": ["a:1", "b:2"]}), "several chiefs"),
        (config(PAIR, "worker", 2), '"index": 2} is not one of the cluster\'s (worker 0, worker 1)'),
        (config(PAIR, "worker", "0"), '"index": "0"} is not one of'),
        (config(PAIR, "worker", True), "is not one of"),
        (config(PAIR, "evaluator", 0), "is not one of"),
        (config({}), "which has none"),
    ],
)
def test_a_wrong_tf_config_is_refused_in_one_line(environment: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_cluster(environment)
    assert words in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_command_refuses_it_before_it_reads_or_writes(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for command in ("train", "build"):
        monkeypatch.setenv("TF_CONFIG", "{")
        fails([command, "--runs", str(tmp_path / "runs")], 2, "TF_CONFIG is not JSON")
        monkeypatch.setenv("TF_CONFIG", config(PAIR)["TF_CONFIG"])
        options = ["--runs", str(tmp_path / "runs"), "--set", "training.batch_size=5"]
        fails([command, *options], 2, "'training.batch_size' is 5, which 2 workers cannot share evenly")
    assert not list(tmp_path.iterdir())


def test_a_batch_is_shared_evenly_in_each_part() -> None:
    check_batch(TrainingRecipe(batch_size=12, accumulation=2), 3)
    with pytest.raises(InputError, match="is 12 in 4 parts, which 2 workers cannot share"):
        check_batch(TrainingRecipe(batch_size=12, accumulation=4), 2)


# Real connections, between threads.


def ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


def clusters(count: int) -> list[Cluster]:
    addresses = tuple(("127.0.0.1", port) for port in ports(count))
    names = tuple(f"worker {index}" for index in range(count))
    return [Cluster(names, addresses, rank) for rank in range(count)]


def together(count: int, work: Callable[[Workers], Any], **options: Any) -> list[Any]:
    """What `work` gives in each of `count` workers, or the error that it ended with."""

    def one(cluster: Cluster) -> Any:
        try:
            with Workers(cluster, {"seed": 1}, **{"timeout": 20.0} | options) as workers:
                return work(workers)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, clusters(count)))


def begin(workers: Workers) -> None:
    if workers.is_chief:
        workers.start_training({"run": "x"})
    else:
        assert workers.receive() == {"train": {"run": "x"}}
        workers.agree()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_sum_is_of_all_workers_and_the_same_bits_in_each(count: int) -> None:
    arrays = np.random.default_rng(0).normal(size=(count, 1_000_003)).astype(np.float32)

    def work(workers: Workers) -> list[Any]:
        begin(workers)
        ours = arrays[workers.rank]
        small = workers.all_reduce(np.array([workers.rank, 1], np.int64))
        scalar, nothing = workers.all_reduce(np.array(2.0)), workers.all_reduce(np.zeros((0, 3), np.float32))
        told = workers.from_chief(np.array([workers.rank + 7], np.uint8))
        if not workers.is_chief:
            total = workers.all_reduce(ours)
            assert workers.receive() == {"done": True}
        else:
            total = workers.all_reduce(ours)
        return [total, small.tolist(), float(scalar), nothing.shape, told.tolist()]

    results = together(count, work)
    exact = arrays.astype(np.float64).sum(0)
    for total, *others in results:
        np.testing.assert_array_equal(total, results[0][0])
        np.testing.assert_allclose(total, exact, atol=1e-5)
        assert others == [[count * (count - 1) // 2, count], 2.0 * count, (0, 3), [7]]
    assert (arrays[0] == np.random.default_rng(0).normal(size=(count, 1_000_003)).astype(np.float32)[0]).all()


def test_workers_that_are_not_at_the_same_sum_do_not_add(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(workers: Workers) -> None:
        begin(workers)
        workers.all_reduce(np.zeros(3 + workers.rank, np.float32))

    monkeypatch.setattr("builder.training.workers.HEARTBEAT_S", 0.1)
    for error in together(2, work):
        assert isinstance(error, TrainingError) and "not at the same step" in str(error), error


def test_the_others_end_with_the_reason_of_the_first() -> None:
    def work(workers: Workers) -> None:
        begin(workers)
        if workers.rank == 1:
            raise InputError("the disk is full")
        workers.all_reduce(np.zeros(8, np.float32))

    started = time.monotonic()
    first, second, third = together(3, work)
    assert time.monotonic() - started < 15
    assert str(second) == "the disk is full"
    for error in (first, third):
        assert isinstance(error, TrainingError) and error.exit_code == 1
        assert str(error).startswith("worker 1 (127.0.0.1:") and str(error).endswith(" failed: the disk is full")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_without_a_sign_of_life_is_given_up(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    waiting = threading.Event()

    def work(workers: Workers) -> None:
        begin(workers)
        if workers.rank == lost:
            # As a process that is stopped, or a machine that is cut off: connected, and silent.
            workers._tell = lambda message: None  # type: ignore[method-assign]
            waiting.wait(20)
            return
        try:
            workers.all_reduce(np.zeros(8, np.float32))
        finally:
            waiting.set()

    error = together(2, work, silence=1.0)[1 - lost]
    assert isinstance(error, TrainingError)
    assert f"worker {lost} (127.0.0.1:" in str(error) and "has not answered for 1 s; run the same command" in str(error)


def test_the_chief_waits_in_silence_as_long_as_it_likes() -> None:
    """A chief that writes a checkpoint, or prepares, sends heartbeats all the while."""

    def work(workers: Workers) -> float:
        if workers.is_chief:
            time.sleep(2.5)
        begin(workers)
        return float(workers.all_reduce(np.ones(1))[0])

    assert together(2, work, silence=0.8) == [2.0, 2.0]


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chief, other = clusters(2)
    with pytest.raises(TrainingError, match=r"worker 1 \(127.0.0.1:\d+\) did not come within 0.3 s; start all"):
        Workers(chief, {}, timeout=0.3).__enter__()
    with pytest.raises(TrainingError, match=r"worker 0 \(127.0.0.1:\d+\) cannot be reached after 0.3 s \(.*refused"):
        Workers(other, {}, timeout=0.3).__enter__()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = Cluster(("worker 0", "worker 1"), (("127.0.0.1", port), ("127.0.0.1", 1)), 0)
        with pytest.raises(TrainingError, match=rf"port {port} of worker 0 .* is in use; end the process that has it"):
            Workers(cluster, {}, timeout=5).__enter__()


@contextlib.contextmanager
def chief_of(cluster: Cluster, identity: dict[str, Any], timeout: float = 20.0) -> Iterator[list[Any]]:
    """A chief in a thread; gives a list that gets its error, or None when all workers have come."""
    ended: list[Any] = []

    def run() -> None:
        try:
            with Workers(cluster, identity, timeout) as workers:
                workers.start_training({})
            ended.append(None)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while True:  # A worker that comes before the chief listens tries again a little later.
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(cluster.addresses[0]):
                break
            time.sleep(0.01)
        yield ended
    finally:
        thread.join(30)


def test_a_worker_with_another_recipe_is_refused_before_the_first_step() -> None:
    chief, other = clusters(2)
    ours = {"gpt2-bundle": "1", "training.learning_rate": 0.1, "training.freeze": ("wte.*",)}
    with chief_of(chief, ours) as ended, pytest.raises(TrainingError) as refusal:
        Workers(other, ours | {"training.learning_rate": 0.2}, timeout=20).__enter__()
    line = str(refusal.value)
    assert line.startswith("worker 1 (127.0.0.1:") and line.endswith(
        "has training.learning_rate = 0.2, and worker 0 has 0.1; start every worker with the same command"
    )
    assert isinstance(ended[0], InputError) and str(ended[0]) == line


def test_a_worker_with_another_cluster_is_refused() -> None:
    chief, other = clusters(2)
    moved = replace(other, addresses=(chief.addresses[0], ("127.0.0.1", other.addresses[1][1] + 1)))
    with chief_of(chief, {}) as ended, pytest.raises(TrainingError, match="was given another cluster than worker 0"):
        Workers(moved, {}, timeout=20).__enter__()
    assert "the worker at 127.0.0.1" in str(ended[0])


def test_a_second_worker_of_one_index_is_refused_and_the_first_trains() -> None:
    three = clusters(3)
    with chief_of(three[0], {}) as ended, ThreadPoolExecutor(2) as pool:

        def work(cluster: Cluster) -> None:
            with Workers(cluster, {}, 20) as workers:
                assert "train" in workers.receive()
                workers.agree()
                assert workers.receive() == {"done": True}

        first = pool.submit(work, three[1])
        time.sleep(0.5)
        with socket.create_connection(three[0].addresses[0]) as again:
            hello = {"rank": 1, "addresses": three[0].addresses, "identity": {}}
            again.sendall(json.dumps(hello).encode() + b"\n")
            assert b"worker 1 runs already; give each process its own index" in again.recv(1000)
        work(three[2])
        first.result(20)
    assert ended == [None]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_worker_that_was_restarted_while_others_come_is_taken(order: tuple[int, int]) -> None:
    three = clusters(3)
    hello = {"rank": 1, "addresses": three[0].addresses, "identity": {}}
    with chief_of(three[0], {}) as ended, ThreadPoolExecutor(2) as pool:
        with socket.create_connection(three[0].addresses[0]) as gone:
            gone.sendall(json.dumps(hello).encode() + b"\n")
            time.sleep(0.3)

        def work(cluster: Cluster) -> None:
            with Workers(cluster, {}, 20) as workers:
                workers.receive()
                workers.agree()
                workers.receive()

        running = []
        for rank in order:
            running.append(pool.submit(work, three[rank]))
            time.sleep(0.3)
        for each in running:
            each.result()
    assert ended == [None]


def test_strangers_at_the_chiefs_port_change_nothing() -> None:
    chief, other = clusters(2)
    with chief_of(chief, {}) as ended:
        time.sleep(0.2)
        deep = b'{"a":' * 200_000
        for words in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n",
            b'{"rank": null}\n',
            b'{"rank": "x"}\n',
            deep,
            b"\xff\n",
        ):
            with contextlib.suppress(OSError), socket.create_connection(chief.addresses[0]) as stranger:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                stranger.recv(100)
        with Workers(other, {}, timeout=20) as workers:
            workers.receive()
            workers.agree()
            workers.receive()
    assert ended == [None]


def test_a_follower_wants_the_chiefs_tokens(tmp_path: Path) -> None:
    """No tokens, or others: both workers end before the first step, each with one line."""

    class Silent:
        def line(self, text: str) -> None: ...

    from builder.stages.run_keys import Run

    run = Run(Recipe(), tmp_path / "run")
    for files, words in (((), "no tokens here"), (("tokens/train.bin", "tokenizer/tokenizer.json"), "other tokens")):
        for name in files:
            (run.prepared / name).parent.mkdir(parents=True, exist_ok=True)
            (run.prepared / name).write_bytes(b"1234")

        def work(workers: Workers) -> None:
            if workers.is_chief:
                workers.start_training({"run": "x", "tokens": "of the chief"})
            else:
                follow(run, workers, Silent())  # type: ignore[arg-type]

        chief, other = together(2, work)
        assert isinstance(other, InputError) and words in str(other), other
        assert isinstance(chief, GPT2BundleError) and str(chief).endswith(f"failed: {other}")


def test_without_tf_config_there_are_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with joined_workers(Recipe(), None) as workers:  # type: ignore[arg-type]
        assert workers is None
