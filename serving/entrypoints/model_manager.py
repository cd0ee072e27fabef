"""Serves a model's newest version: a new one loads and warms up while the old one serves, then replaces it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from queue import Empty, Queue
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.models import BPE

from serving.bundle import Bundle, open_bundle
from serving.engine.api import Engine, EngineStats, Event, FinishEvent, GenerationRequest, Handle, Listener, Observer
from serving.entrypoints.replicas import Replicas
from serving.entrypoints.version_sources import Candidate, check_source, find
from serving.errors import GPT2BundleError
from serving.sampling import SamplingParams
from serving.server.grammar_pool import prepare
from serving.server.metrics import WARM_UP
from serving.server.registry import ModelNotReadyError, ServedModel, State
from serving.server.state import Server

WARM_SECONDS = 300.0
_MEBIBYTE = 1 << 20
log = logging.getLogger("gpt2_bundle.versions")


class Loader(Protocol):
    """Makes engines of bundles, all in the same way."""

    def estimate(self, bundle: Bundle) -> int:
        """About how many bytes of memory `open` takes."""

    def open(self, bundle: Bundle, observer: Observer) -> Engine:
        """An engine of `bundle`. Raises GPT2BundleError."""


class _Pending:
    """Stands for the engine of a version that is still loading: refuses everything."""

    vocab_size = n_positions = 1
    eos_token_id = 0
    unsupported: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(BPE())

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        raise ModelNotReadyError("this version is still loading")

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0)

    def drain(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        pass


class ModelManager:
    """The versions of one model, from one folder. `poll` is called by one thread at a time."""

    def __init__(self, folder: Path, server: Server, loader: Loader, name: str | None, budget: int | None) -> None:
        """`budget` is in bytes, for all versions that are loaded at once; None is what the machine has available."""
        self._folder, self._server, self._loader, self._budget = folder, server, loader, budget
        self.name = name
        self._current: tuple[Candidate, ServedModel] | None = None
        self._estimates: dict[int, int] = {}
        self._retiring: dict[int, threading.Thread] = {}
        self._refused: set[str] = set()
        self._empty = False
        self._last_version = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> ServedModel:
        """Load the newest version that works, and log those that do not. Raises GPT2BundleError if none does."""
        check_source(self._folder)
        candidates = find(self._folder)
        for candidate in candidates[:-1]:
            if self._try(candidate):
                break
        else:
            self._swap(candidates[-1])
        assert self._current is not None
        return self._current[1]

    def watch(self, seconds: float) -> None:
        """Poll every `seconds` in a thread of its own until `close`."""

        def run() -> None:
            while not self._stop.wait(seconds):
                try:
                    self.poll()
                except Exception:  # The folder's troubles must not end the watch.
                    log.exception("the folder %s could not be looked at", self._folder)

        threading.Thread(target=run, name="watch", daemon=True).start()

    def poll(self) -> None:
        """Look at the folder once, and swap if there is something newer, or if the current version was taken away."""
        with self._lock:
            for candidate in self._find():
                current = self._current
                if current is not None and candidate.identity == current[0].identity:
                    return
                if self._stop.is_set() or candidate.version in self._retiring or self._try(candidate):
                    return

    def _find(self) -> list[Candidate]:
        """What is in the folder; if that is nothing, a line says so, and one when there is something again."""
        try:
            candidates = find(self._folder)
            problem = "has no version" if self._folder.is_dir() else "is gone"
        except OSError as error:
            candidates, problem = [], f"cannot be read ({error.strerror})"
        if self._empty != (not candidates):
            self._empty = not candidates
            if candidates:
                log.info("%s has a version again", self._folder)
            elif self._current is not None:
                model = self._current[1]
                log.warning("%s %s; version %d of %s is served on", self._folder, problem, model.version, model.name)
        return candidates

    def _try(self, candidate: Candidate) -> bool:
        """Swap to `candidate`, or log once why not and keep the served version."""
        signature = candidate.signature()
        if signature in self._refused:
            return False
        try:
            self._swap(candidate)
        except Exception as error:
            if not self._retiring:  # Else it may be for want of memory that will be free soon.
                self._refused.add(signature)
            known = isinstance(error, GPT2BundleError)
            log.error("refused %s: %s", candidate.folder, error, exc_info=None if known else error)
            return False
        return True

    def _swap(self, candidate: Candidate) -> None:
        bundle = open_bundle(candidate.folder, check="hashes")
        version = candidate.version or self._last_version + 1
        estimate = self._loader.estimate(bundle)
        self._check_memory(candidate.folder, estimate)
        name = self.name or bundle.manifest.name
        model = ServedModel(name, version, bundle, _Pending(), int(time.time()), State.LOADING)
        registry, metrics = self._server.registry, self._server.metrics.model(name, version)
        registry.add(model)
        engine: Engine | None = None
        metrics.warming = True
        try:
            engine = self._loader.open(bundle, metrics)
            warm(engine)
            prepare(engine)
        except BaseException:
            registry.remove(name, version)
            if engine is not None:
                engine.close()
            raise
        metrics.begin(engine)
        model.engine = engine
        self.name = name
        self._estimates[version] = estimate
        before, self._current = self._current, (candidate, model)
        registry.take_over(model, None if before is None else before[1])
        self._last_version = max(version, self._last_version)
        log.info("version %d of %s takes over", version, name, extra={"folder": str(candidate.folder)})
        if before is not None:
            self._retire(before[1])

    def _check_memory(self, folder: Path, estimate: int) -> None:
        loaded = sum(self._estimates.values())
        room = _available_memory() if self._budget is None else self._budget - loaded
        if room is not None and estimate > room:
            raise GPT2BundleError(
                f"{folder} needs about {estimate // _MEBIBYTE} MiB of memory and {max(room, 0) // _MEBIBYTE} MiB are "
                "left; raise --memory-budget, or serve fewer slots"
            )

    def _retire(self, model: ServedModel) -> None:
        """Let `model` end what it has, in a thread of its own, and forget it."""

        def run() -> None:
            model.engine.drain(self._server.settings.request_timeout or threading.TIMEOUT_MAX)
            model.state = State.END
            self._server.metrics.model(model.name, model.version).release()
            model.close()
            self._server.registry.remove(model.name, model.version)
            self._estimates.pop(model.version, None)
            self._retiring.pop(model.version, None)
            log.info("version %d of %s is unloaded", model.version, model.name)

        thread = threading.Thread(target=run, name=f"retire-{model.version}", daemon=True)
        self._retiring[model.version] = thread
        thread.start()

    def _loaded(self) -> list[ServedModel]:
        return (
            []
            if self.name is None or self.name not in self._server.registry.names()
            else self._server.registry.versions(self.name)
        )

    def drain(self, timeout: float) -> bool:
        """Take no more versions in, and let every loaded one end what it has within `timeout` seconds in all."""
        self._stop.set()
        deadline = time.monotonic() + timeout
        threads = []
        results: Queue[bool] = Queue()
        for model in self._loaded():
            engine = model.engine
            thread = threading.Thread(target=lambda engine=engine: results.put(engine.drain(timeout)), daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()) + 1)
        return sum(1 for _ in threads if _taken(results)) == len(threads)

    def close(self) -> None:
        """Close every model."""
        self._stop.set()
        for model in self._loaded():
            model.state = State.END
            model.close()


def _taken(results: Queue[bool]) -> bool:
    try:
        return results.get_nowait()
    except Empty:
        return False


def warm(engine: Engine) -> None:
    """Have `engine`, and each of its replicas, generate two tokens. Raises GPT2BundleError if one does not."""
    for each in engine.engines if isinstance(engine, Replicas) else (engine,):
        events: Queue[Event] = Queue()
        params = SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)
        each.submit(
            GenerationRequest((each.eos_token_id,), params, timeout=WARM_SECONDS, request_id=WARM_UP), events.put
        )
        while not isinstance(event := events.get(), FinishEvent):
            pass
        if event.reason not in ("length", "stop"):
            raise GPT2BundleError(f"it does not generate: {event.message or event.reason}")
        _settle(each)


def _settle(engine: Engine) -> None:
    """Wait until the step that ended the last request is over, as its measurements follow its events."""
    deadline = time.monotonic() + 1
    while engine.stats().active_slots and time.monotonic() < deadline:
        time.sleep(1e-3)


def _available_memory() -> int | None:
    """Bytes that Linux says new programs can have; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
