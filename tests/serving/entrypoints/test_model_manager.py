"""Versions come and go while requests run; several engines are one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving.bundle import Bundle
from serving.engine.api import Engine, FinishEvent, GenerationRequest, Observer, QueueFullError
from serving.entrypoints import model_manager
from serving.entrypoints.http_app import build_app
from serving.entrypoints.model_manager import ModelManager
from serving.entrypoints.replicas import Replicas
from serving.errors import BundleError, GPT2BundleError, InputError
from serving.sampling import SamplingParams
from serving.server.registry import ModelRegistry, State
from serving.server.settings import Settings
from tests.closed_form import write_bundle
from tests.serving.double_engine import DoubleEngine
from tests.serving.server.test_middleware import wait_for


class Loader:
    """Opens doubles, each said to take 100 bytes."""

    def __init__(self) -> None:
        self.engines: list[DoubleEngine] = []
        self.mute = False

    def estimate(self, bundle: Bundle) -> int:
        return 100

    def open(self, bundle: Bundle, observer: Observer) -> Engine:
        engine = DoubleEngine(observer=observer)
        if self.mute:
            engine.broken = "no logits"
        self.engines.append(engine)
        return engine


class Served:
    """A folder and everything that serves it."""

    def __init__(self, folder: Path, budget: int | None = 250) -> None:
        self.folder, self.loader = folder, Loader()
        self.app = build_app(ModelRegistry(), Settings())
        self.registry: ModelRegistry = self.app.state.server.registry
        self.versions = ModelManager(folder, self.app.state.server, self.loader, None, budget)

    def put(self, version: int) -> None:
        write_bundle(self.folder / str(version), f"tiny{version}")

    def states(self) -> dict[int, State]:
        return {model.version: model.state for name in self.registry.names() for model in self.registry.versions(name)}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "models")
    served.put(1)
    yield served
    served.versions.close()


def test_a_new_version_takes_over_and_requests_end_on_theirs(served: Served) -> None:
    served.versions.start()
    with TestClient(served.app) as client:
        served.loader.engines[0].paused.set()
        answers: list[str] = []
        body = {"prompt": "A", "temperature": 0}
        ask = lambda: answers.append(client.post("/v1/completions", json=body).json()["system_fingerprint"])  # noqa: E731
        before = threading.Thread(target=ask)
        before.start()
        wait_for(lambda: served.loader.engines[0].stats().waiting_requests == 1)
        served.put(2)
        served.versions.poll()
        assert served.states() == {2: State.AVAILABLE, 1: State.UNLOADING}
        ask()
        assert answers[0].startswith("v2-")
        served.loader.engines[0].paused.clear()
        before.join(10)
        assert answers[1].startswith("v1-")
        wait_for(lambda: served.states() == {2: State.AVAILABLE})
        assert 'version="2"' in client.get("/metrics").text


def test_taking_the_version_away_goes_back_to_the_one_before(served: Served) -> None:
    served.put(2)
    served.versions.start()
    assert served.states() == {2: State.AVAILABLE}
    shutil.rmtree(served.folder / "2")
    served.versions.poll()
    wait_for(lambda: served.states() == {1: State.AVAILABLE})
    shutil.rmtree(served.folder / "1")
    served.versions.poll()
    assert served.states() == {1: State.AVAILABLE}, "what is loaded stays when nothing is left"


def test_a_folder_that_goes_away_is_logged_once_and_when_it_is_back(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "gpt2_bundle.versions")
    served.versions.start()
    caplog.clear()
    away = served.folder.with_name("away")

    def lines() -> list[str]:
        for _ in range(3):
            served.versions.poll()
        found = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
        caplog.clear()
        return found

    assert lines() == []
    served.folder.rename(away)
    assert lines() == [f"WARNING {served.folder} is gone; version 1 of tiny1 is served on"]
    served.folder.mkdir()
    assert lines() == []
    served.folder.rmdir()
    away.rename(served.folder)
    assert lines() == [f"INFO {served.folder} has a version again"]
    shutil.move(served.folder / "1", away)
    assert lines() == [f"WARNING {served.folder} has no version; version 1 of tiny1 is served on"]
    shutil.move(away, served.folder / "1")
    assert len(lines()) == 1

    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(model_manager, "find", refused)
        assert lines() == [
            f"WARNING {served.folder} cannot be read (Permission denied); version 1 of tiny1 is served on"
        ]
    assert len(lines()) == 1 and served.states() == {1: State.AVAILABLE}


def test_metrics_know_no_warm_up_and_count_on_after_a_rollback(served: Served) -> None:
    def values() -> list[float]:
        names = ("request_success", "e2e_request_latency_seconds", "generation_tokens", "steps")
        metrics = served.app.state.server.metrics.registry.collect()
        found = {
            sample.name.removeprefix("gpt2_bundle_"): sample.value
            for metric in metrics
            for sample in metric.samples
            if sample.labels.get("version") == "1"
        }
        return [found.get(f"{name}_total", found.get(f"{name}_count", 0.0)) for name in names]

    served.versions.start()
    assert values() == [0, 0, 0, 0]
    with TestClient(served.app) as client:
        assert client.post("/v1/completions", json={"prompt": "AB", "max_tokens": 3}).status_code == 200
        wait_for(lambda: values()[:3] == [1, 1, 3])
        served.put(2)
        served.versions.poll()
        shutil.rmtree(served.folder / "2")
        wait_for(lambda: served.states() == {2: State.AVAILABLE})
        assert values()[:3] == [1, 1, 3]
        served.versions.poll()
        assert (
            client.post("/v1/completions", json={"prompt": "AB", "max_tokens": 3}).json()["system_fingerprint"][:3]
            == "v1-"
        )
        wait_for(lambda: values()[:3] == [2, 2, 6])


def test_a_broken_version_is_refused_once_and_again_when_it_changes(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.versions.start()
    served.put(2)
    data = served.folder / "2" / "ort/fp32/model.onnx"
    whole = data.read_bytes()
    data.write_bytes(b"x" * len(whole))
    for _ in range(3):
        served.versions.poll()
    assert [record.levelname for record in caplog.records].count("ERROR") == 1 and "SHA-256" in caplog.text
    assert served.states() == {1: State.AVAILABLE}
    data.write_bytes(whole)
    served.versions.poll()
    wait_for(lambda: served.states() == {2: State.AVAILABLE})


def test_a_version_that_does_not_generate_is_refused(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.versions.start()
    served.loader.mute = True
    served.put(2)
    served.versions.poll()
    assert "does not generate: no logits" in caplog.text and served.states() == {1: State.AVAILABLE}
    assert not served.loader.engines[1]._thread.is_alive(), "its engine is closed"


def test_a_version_beyond_the_memory_budget_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(tmp_path / "models", budget=150)
    served.put(1)
    served.versions.start()
    served.put(2)
    served.versions.poll()
    assert "--memory-budget" in caplog.text and served.states() == {1: State.AVAILABLE}
    served.versions.close()


def test_a_bundle_folder_that_is_replaced_counts_up(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_bundle(folder, "tiny1")
    served = Served(folder)
    served.versions.start()
    served.versions.poll()
    assert served.states() == {1: State.AVAILABLE}
    shutil.rmtree(folder)
    served.versions.poll()
    write_bundle(folder, "another")
    served.versions.poll()
    wait_for(lambda: served.states() == {2: State.AVAILABLE})
    served.versions.close()


def test_a_server_does_not_start_on_what_is_no_bundle(tmp_path: Path, served: Served) -> None:
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "neither a bundle")):
        with pytest.raises(InputError, match=words):
            Served(folder).versions.start()
    (served.folder / "1" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="tokenizer"):
        served.versions.start()
    served.loader.mute = True


def test_draining_ends_what_is_left_after_its_time(served: Served) -> None:
    served.versions.start()
    engine = served.loader.engines[0]
    assert served.versions.drain(5) is True
    engine._draining = False
    engine.paused.set()
    ends: list[FinishEvent] = []
    engine.submit(
        GenerationRequest((1,), SamplingParams()),
        lambda event: ends.append(event) if isinstance(event, FinishEvent) else None,
    )
    assert served.versions.drain(0.05) is False
    assert [end.reason for end in ends] == ["timeout"]


def test_replicas_share_the_load_and_refuse_when_all_are_full() -> None:
    engines = [DoubleEngine(slots=2, queue=1) for _ in range(3)]
    replicas = Replicas(engines)
    for engine in engines:
        engine.paused.set()
    done = threading.Semaphore(0)
    finished = lambda event: done.release() if isinstance(event, FinishEvent) else None  # noqa: E731
    for _ in range(3):
        replicas.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=3)), finished)
    assert [engine.stats().waiting_requests for engine in engines] == [1, 1, 1]
    assert replicas.stats().waiting_requests == 3 and replicas.stats().slots == 6
    with pytest.raises(QueueFullError):
        replicas.submit(GenerationRequest((1,), SamplingParams()), finished)
    for engine in engines:
        engine.paused.clear()
    assert all(done.acquire(timeout=10) for _ in range(3))
    assert replicas._load == [0, 0, 0]
    with pytest.raises(InputError):
        replicas.submit(GenerationRequest((999,), SamplingParams()), finished)
    assert replicas._load == [0, 0, 0]
    assert replicas.drain(5) is True
    with pytest.raises(GPT2BundleError):
        replicas.submit(GenerationRequest((1,), SamplingParams()), finished)
    replicas.close()
