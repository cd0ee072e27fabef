"""A request to an engine as benchmarks see it: its tokens, and when each came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from serving.engine.api import Engine, Event, FinishEvent, GenerationRequest, PromptEvent, TokenEvent
from serving.errors import GPT2BundleError


class Stream:
    """The continuations of one prompt: `tokens` and `times` of each, in seconds of `time.monotonic`, as they come.

    `text` is what came of all, in pieces; `ends` are the last events. `on_end` is called in the engine's own thread.
    """

    def __init__(
        self, engine: Engine, request: GenerationRequest, on_end: Callable[[Stream], None] | None = None
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(request.n)]
        self.times: list[list[float]] = [[] for _ in range(request.n)]
        self.text: list[str] = []
        self.ends: list[FinishEvent] = []
        self.begun, self._ended = threading.Event(), threading.Event()
        self._on_end = on_end
        self.sent = time.monotonic()
        self.handle = engine.submit(request, self._hear)

    def _hear(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, PromptEvent):
            return
        self.text.append(event.text)
        if isinstance(event, TokenEvent):
            self.tokens[event.index].append(event.token_id)
            self.times[event.index].append(now)
            if len(self.times[event.index]) == 1 and all(self.times):
                self.begun.set()
            return
        self.ends.append(event)
        if len(self.ends) == len(self.tokens):
            self._ended.set()
            if self._on_end is not None:
                self._on_end(self)

    def wait(self) -> Stream:
        """Return at the end of all continuations."""
        self._ended.wait()
        return self

    def whole(self) -> Stream:
        """The same. Raises GPT2BundleError unless each ended by its length: rates of shorter ones mean nothing."""
        reasons = {end.reason for end in self.wait().ends}
        if reasons != {"length"}:
            raise GPT2BundleError(f"a stream ended with {', '.join(sorted(reasons))}, so its rate means nothing")
        return self
