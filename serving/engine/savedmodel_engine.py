"""An engine over the slots of a SavedModel: TensorFlow Serving's by REST or gRPC, or TensorFlow in this process.

One thread owns the slots. Each of its rounds ends what was cancelled or is late, gives waiting prompts slots, and
advances all running streams by one call; docs/slots.md has the protocol and
`serving.clients.slot_pool` the client's part of it.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time

from tokenizers import Tokenizer

from serving.bundle import Bundle, Geometry
from serving.clients.slot_pool import UNSUPPORTED, SlotStream, check_slot_params
from serving.clients.tf_serving import TFServingClient
from serving.clients.transport import Transport
from serving.engine.api import (
    DrainingError,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Listener,
    Observer,
    QueueFullError,
)
from serving.engine.savedmodel_rounds import Job, Rounds
from serving.errors import InputError
from serving.sampling.detokenizer import TextStream, TokenBytes, load_tokenizer

DEFAULT_SLOTS = 8


def open_slot_engine(
    bundle: Bundle,
    transport: Transport,
    *,
    slots: int | None = None,
    steps: int = 1,
    max_waiting: int = 128,
    timeout: float = 60.0,
    retries: int = 4,
    observer: Observer | None = None,
) -> SignatureEngine:
    """Serve `bundle`'s model by the server of `transport`, which must hold the same model.

    `slots` is how many streams run at once at most, by default what the bundle's recipe exported; `timeout` (seconds)
    and `retries` are a call's, as of `TFServingClient`. Raises InputError if the served model has no slots,
    or fewer than `slots`.
    """
    client = TFServingClient(transport, timeout=timeout, retries=retries)
    if not client.has_slots():
        raise InputError(f"the served model of {bundle.folder} has no slots; export it with export.slots above 0")
    exported = bundle.manifest.provenance.recipe.get("export")
    found = exported.get("slots") if isinstance(exported, dict) else None
    there = found if isinstance(found, int) and found > 0 else None
    if slots is not None and there is not None and slots > there:
        raise InputError(f"{slots} slots were asked for, and the model was exported with {there}; ask for fewer")
    slots = slots or there or DEFAULT_SLOTS
    tokenizer = load_tokenizer(bundle)
    return SignatureEngine(
        client, tokenizer, bundle.manifest.model, slots, steps=steps, max_waiting=max_waiting, observer=observer
    )


class SignatureEngine:
    """Requests over slots; see `serving.engine.api.Engine`.

    A request's end by its timeout or `cancel` takes effect between two calls, so a call that hangs delays it by the
    client's own timeout at most.
    """

    unsupported = UNSUPPORTED | {"logprobs", "prompt_logprobs", "prompt_only", "grammar"}

    def __init__(
        self,
        client: TFServingClient,
        tokenizer: Tokenizer,
        geometry: Geometry,
        slots: int,
        *,
        steps: int = 1,
        max_waiting: int = 128,
        observer: Observer | None = None,
    ) -> None:
        self.vocab_size, self.n_positions = geometry.vocab_size, geometry.n_positions
        self.eos_token_id, self.tokenizer = geometry.eos_token_id, tokenizer
        self._slots, self._max_waiting = slots, max_waiting
        self._token_bytes = TokenBytes(tokenizer)
        self._changed = threading.Condition()
        self._rounds = Rounds(client, slots, steps, observer, self._changed)
        self._arrived: list[Job] = []
        self._draining = self._closing = False
        self._end_all: tuple[FinishReason, str] | None = None
        self._thread = threading.Thread(target=self._serve, name="slots", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Listener) -> Job:
        """See `Engine.submit`."""
        self._check(request)
        streams = [
            SlotStream(
                request.prompt,
                dataclasses.replace(request.params, seed=request.seed(index)),
                self.eos_token_id,
                lambda: TextStream(self._token_bytes, request.params.stop_automaton),
            )
            for index in range(request.n)
        ]
        job = Job(self.wake, request, listener, streams, time.monotonic())
        with self._changed:
            if self._draining or self._closing:
                raise DrainingError("the engine is shutting down and takes no new requests")
            waiting = self._waiting()
            if waiting >= self._max_waiting and not request.joins_call:
                retry_after = max(1, math.ceil(self._rounds.seconds * waiting / self._slots))
                raise QueueFullError(f"{waiting} requests wait already; try again in {retry_after} s", retry_after)
            self._arrived.append(job)
            self._changed.notify_all()
        return job

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._changed:
            running = list(self._rounds.pool.running)
            return EngineStats(
                slots=self._slots,
                active_slots=len(running),
                waiting_requests=self._waiting(),
                cache_tokens=sum(len(stream.prompt) + stream.received for stream in running),
                cache_capacity=self._slots * self.n_positions,
                prompt_tokens=self._rounds.prompt_tokens,
                generated_tokens=self._rounds.generated,
                steps=self._rounds.steps,
            )

    def drain(self, timeout: float) -> bool:
        """See `Engine.drain`."""
        with self._changed:
            self._draining = True
            if self._changed.wait_for(lambda: not self._arrived and not self._rounds.jobs, timeout):
                return True
            self._end_all = ("timeout", f"the server stopped before the text was finished, after {timeout:g} s")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._arrived and not self._rounds.jobs)
            return False

    def close(self) -> None:
        """See `Engine.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def wake(self) -> None:
        """Have the engine's thread look at what was cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _waiting(self) -> int:
        return len(self._arrived) + sum(job.scheduled is None for job in self._rounds.jobs)

    def _check(self, request: GenerationRequest) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(request, name) is not None:
                raise InputError(f"{name} is not done over slots, which give tokens alone; leave it out")
        if request.grammar is not None:
            raise InputError("structured output is not done over slots, which choose tokens in their graph")
        if request.prompt_only:
            raise InputError("reading a prompt alone is not done over slots, which give tokens; ask for one token")
        check_slot_params(request.params)
        if request.n > self._slots:
            raise InputError(f"n is {request.n}, but there are {self._slots} slots; ask for fewer")
        if not 1 <= len(request.prompt) < self.n_positions:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; it must have from 1 to {self.n_positions - 1}, "
                f"so that one more fits the context of {self.n_positions}"
            )
        outside = next((token for token in request.prompt if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise InputError(f"the prompt has the token id {outside}, outside the vocabulary of {self.vocab_size}")

    def _serve(self) -> None:
        rounds = self._rounds
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, rounds.nap())
                for job in self._arrived:
                    rounds.enqueue(job)
                self._arrived.clear()
                closing, end_all = self._closing, self._end_all
            try:
                rounds.end_late(("cancelled", "") if closing else end_all)
                if not closing:
                    rounds.round()
            except Exception as error:  # A bug, or another kind of server: no client may wait forever.
                rounds.give_up(f"internal error: {type(error).__name__}: {error}")
            if closing:
                return

    def _has_work(self) -> bool:
        ends = self._end_all is not None and self._rounds.jobs
        return bool(self._arrived or self._closing or ends) or self._rounds.has_work()
