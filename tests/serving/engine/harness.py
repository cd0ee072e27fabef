"""An engine that a test steps by hand, with a clock that the test moves, and everything that it says."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from serving.engine.api import Event, FinishEvent, GenerationRequest, PromptEvent, RequestRecord, StepRecord, TokenEvent
from serving.engine.config import SHARED_CHUNK, EngineConfig
from serving.engine.engine import SlotEngine
from serving.generation import generate
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import TextStream
from tests.closed_form import ClosedFormBackend, ClosedFormSlotBackend, byte_tokenizer

EOS = 256
TOKENIZER = byte_tokenizer()


class Heard:
    """A listener that holds the engine to the order of events."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.events: list[Event] = []
        self.prompt: PromptEvent | None = None
        self.tokens: dict[int, list[TokenEvent]] = defaultdict(list)
        self.ends: dict[int, FinishEvent] = {}

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, PromptEvent):
            assert self.prompt is None and not self.tokens
            self.prompt = event
            return
        assert 0 <= event.index < self.request.n and event.index not in self.ends
        if isinstance(event, TokenEvent):
            assert self.prompt is not None
            self.tokens[event.index].append(event)
        else:
            self.ends[event.index] = event

    @property
    def done(self) -> bool:
        return len(self.ends) == self.request.n

    def ids(self, index: int = 0) -> list[int]:
        return [each.token_id for each in self.tokens[index]]

    def text(self, index: int = 0) -> str:
        return "".join(each.text for each in self.tokens[index]) + self.ends[index].text


class Observed:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.finished: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        self.finished.append(record)


class Stepped:
    """The engine over a closed-form backend."""

    def __init__(
        self, *, slots: int = 4, chunk: int | None = 8, copies: bool = True, length: int = 64, **config: Any
    ) -> None:
        self.backend = ClosedFormSlotBackend(slots, length, chunk or SHARED_CHUNK, copies)
        self.now = 0.0
        self.observed = Observed()
        settings = EngineConfig(slots=slots, prefill_chunk=chunk, **config)
        self.engine = SlotEngine(
            self.backend, TOKENIZER, EOS, settings, self.observed, clock=lambda: self.now, start=False
        )

    def submit(self, prompt: list[int], **fields: Any) -> tuple[Heard, Any]:
        own = {name: fields.pop(name) for name in list(fields) if name in GenerationRequest.__dataclass_fields__}
        request = GenerationRequest(tuple(prompt), own.pop("params", None) or SamplingParams(**fields), **own)
        heard = Heard(request)
        return heard, self.engine.submit(request, heard)

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            if not self.engine.step():
                return
        assert steps < 10_000, "the engine does not come to an end"

    def check_idle(self) -> None:
        stats = self.engine.stats()
        assert (stats.active_slots, stats.waiting_requests, stats.cache_tokens) == (0, 0, 0)


def wanted(request: GenerationRequest, index: int, length: int = 64) -> tuple[list[int], str, str]:
    """What `generate` continues the request's prompt by, up to a stop text: ids, text, and why it ended."""
    params = replace(request.params, seed=request.seed(index))
    text = TextStream(TOKENIZER, params.stop)
    pieces = []

    def on_token(row: int, token: int) -> bool:
        pieces.append(text.push(token))
        return text.stopped

    (result,) = generate(ClosedFormBackend(257, length), [request.prompt], params, EOS, on_token)
    return list(result.token_ids), "".join(pieces) + text.finish(), result.finish_reason
