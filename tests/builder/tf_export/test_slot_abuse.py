"""Callers that give up at any moment, or ask for nonsense, next to callers that wait: nobody gets a wrong token.

Deadlines are `RunOptions.timeout_in_ms`, into which TensorFlow Serving turns those of its own callers.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import tf
from serving.clients.slot_pool import NO_FREE_SLOT, RUNNING
from tests.builder.tf_export.savedmodel_calls import Call, columns, padded, session_call
from tests.builder.tf_export.test_servable import VOCABULARY
from tests.builder.tf_export.test_slots import decode, prefill, release, save, tokens

SLOTS = 4
# Seconds that a call may take on a busy machine.
PATIENCE = 120.0
DEADLINES_MS = (1, 2, 3, 5, 10, 20, 50, 100)
REQUESTS = itertools.count(1)


class Abuse:
    """Callers of one servable in threads of their own, until `seconds` have passed since each signature was warm."""

    def __init__(self, call: Call, context: int, seconds: float) -> None:
        self._call, self.counts, self.problems = call, Counter[str](), list[str]()
        random = np.random.default_rng(3)
        self.jobs: list[tuple[list[int], dict[str, Any]]] = [
            (
                random.integers(0, VOCABULARY, random.integers(1, context // 2)).tolist(),
                {
                    "max_new_tokens": int(random.integers(1, context // 2)),
                    "temperature": float(random.choice([0.0, 1.0])),
                    "seed": int(random.integers(0, 2**62)),
                },
            )
            for _ in range(12)
        ]
        self.wanted = [self.whole([job]) for job in range(len(self.jobs))]
        self.stream(np.random.default_rng(0))
        self.until = time.monotonic() + seconds

    def call(self, signature: str, options: Any = None, **inputs: Any) -> dict[str, Any]:
        """Call until the answer is no CANCELLED, which comes rarely: another deadline met the beginning of a step."""
        while True:
            self.counts["calls"] += 1
            try:
                return self._call(signature, options=options, **inputs)
            except tf.errors.CancelledError:
                self.counts["cancelled"] += 1

    def whole(self, jobs: list[int], options: Any = None) -> list[list[int]]:
        prompts, rows = [self.jobs[job][0] for job in jobs], [self.jobs[job][1] for job in jobs]
        return tokens_of(self.call("serving_default", options=options, **padded(prompts), **columns(rows)))

    def patient(self, random: np.random.Generator) -> None:
        jobs = random.integers(0, len(self.jobs), random.integers(1, 2 * SLOTS)).tolist()
        assert self.whole(jobs) == [self.wanted[job][0] for job in jobs]
        self.counts["whole answers"] += len(jobs)

    def stream(self, random: np.random.Generator) -> None:
        job, request = int(random.integers(len(self.jobs))), next(REQUESTS)
        prompt, row = self.jobs[job]
        while (held := prefill(self.call, [prompt], [row], [request]))["status"][0] == NO_FREE_SLOT:
            time.sleep(0.01)
        text, status = tokens(held)[0], held["status"][0]
        while status == RUNNING:
            answer = decode(self.call, held, len(text), int(random.choice([1, 3, 64])))
            text, status = text + tokens(answer)[0], answer["status"][0]
        assert [text] == self.wanted[job], (text, self.wanted[job], status)
        release(self.call, held)
        self.counts["streams"] += 1

    def impatient(self, random: np.random.Generator) -> None:
        options = tf.compat.v1.RunOptions(timeout_in_ms=int(random.choice(DEADLINES_MS)))

        def hurried(signature: str, **inputs: Any) -> dict[str, Any]:
            return self.call(signature, options=options, **inputs)

        job, request = int(random.integers(len(self.jobs))), next(REQUESTS)
        prompt, row = self.jobs[job]
        try:
            if random.random() < 0.5:
                assert self.whole([job], options) == self.wanted[job]
            else:
                held = prefill(hurried, [prompt], [row], [request])
                if held["status"][0] == RUNNING:
                    decode(hurried, held, 1, 64)
            self.counts["in time"] += 1
        except tf.errors.DeadlineExceededError:
            self.counts["given up"] += 1
        self.call("cancel_slots", request_id=np.array([request], np.int64))

    def nonsense(self, random: np.random.Generator) -> None:
        wrong = [{"lengths": [0]}, {"temperature": [np.nan]}, {"seed": [-1]}, {"token_ids": [[10**6]]}]
        inputs = padded([[1]]) | columns([{}])
        changes = wrong[int(random.integers(len(wrong)))]
        with pytest.raises(tf.errors.InvalidArgumentError):
            self.call("serving_default", **inputs | {n: np.array(v, inputs[n].dtype) for n, v in changes.items()})
        assert not self.call("serving_default", **{name: value[:0] for name, value in inputs.items()})["lengths"].size
        self.counts["refused"] += 1

    def run(self) -> None:
        kinds = [self.patient] * 3 + [self.stream] * 3 + [self.impatient] * 4 + [self.nonsense]
        threads = [threading.Thread(target=self._repeat, args=each, daemon=True) for each in enumerate(kinds)]
        for thread in threads:
            thread.start()
        deadline = self.until + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not self.problems, self.problems[:3]
        assert not any(thread.is_alive() for thread in threads), "a call hangs"
        assert all(self.counts[name] for name in ("whole answers", "streams", "in time", "given up", "refused"))
        assert self.counts["cancelled"] <= 1 + self.counts["calls"] // 200, self.counts

    def _repeat(self, number: int, kind: Callable[[np.random.Generator], None]) -> None:
        random = np.random.default_rng(number)
        try:
            while time.monotonic() < self.until:
                kind(random)
        except BaseException as error:
            self.problems.append(f"{kind.__name__}: {type(error).__name__}: {getattr(error, 'message', error)}")
            self.until = 0.0

    def all_slots_come_free(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            ids = [next(REQUESTS) for _ in range(SLOTS)]
            answer = prefill(self.call, [[1]] * SLOTS, [{}] * SLOTS, ids)
            self.call("cancel_slots", request_id=np.array(ids, np.int64))
            if (answer["status"] != NO_FREE_SLOT).all():
                return
            assert time.monotonic() < deadline, "a slot was lost"
            time.sleep(0.1)


def tokens_of(outputs: dict[str, Any]) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(outputs["token_ids"], outputs["lengths"], strict=True)]


@pytest.mark.slow
def test_callers_that_give_up_cost_others_nothing(tmp_path: Path) -> None:
    abuse = Abuse(save(tmp_path, slots=SLOTS, slot_lease=3600.0), context=48, seconds=4.0)
    abuse.run()
    abuse.all_slots_come_free()


@pytest.mark.slow
def test_ten_minutes_of_it_on_steps_that_take_a_while(tmp_path: Path) -> None:
    from builder.model.gpt2 import GPT2
    from builder.tf_export.servable import Servable
    from serving.bundle import Geometry

    sizes = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_inner": 1024}
    geometry = Geometry(
        **sizes, layer_norm_epsilon=1e-5, activation_function="gelu_new", bos_token_id=0, eos_token_id=0
    )
    Servable(GPT2.create(geometry), slots=SLOTS, slot_lease=3600.0).save(tmp_path)
    abuse = Abuse(session_call(str(tmp_path)), context=128, seconds=600.0)
    abuse.run()
    abuse.all_slots_come_free()
