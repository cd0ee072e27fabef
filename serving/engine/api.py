"""What the engine takes and gives: requests from any thread, events in order, one error for each refusal.

Protocols and metrics know only this file, not how a step is scheduled and run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tokenizers import Tokenizer

from serving.errors import GPT2BundleError, InputError
from serving.sampling import MAX_SEED, SamplingParams
from serving.sampling.constraints import Grammar

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
MAX_CONTINUATIONS = 128
MAX_LOGPROBS = 20


class QueueFullError(GPT2BundleError):
    """No room for another request; `retry_after` is in how many seconds to try again, at least 1."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(GPT2BundleError):
    """The engine finishes what it has and takes nothing new."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. Raises InputError for `n`, `logprobs` or `timeout` out of range."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: SamplingParams
    n: int = 1
    """Continuations of the prompt, from one prefill; the i-th draws with the seed `params.seed + i` modulo 2^63."""
    logprobs: int | None = None
    """Number of most likely tokens to report with each token's own log-probability; None reports neither.

    Log-probabilities (nats) are those of the model's own logits, before temperature, bias and penalties.
    """
    prompt_logprobs: int | None = None
    """The same for the prompt's own tokens, the first of which has none."""
    prompt_only: bool = False
    """Nothing is added: each continuation ends with "length" once the prompt, which may fill the context, was read."""
    timeout: float | None = None
    """Seconds from submission to the last token, the wait in the queue included; None is without end."""
    request_id: str = ""
    joins_call: bool = False
    """It belongs to a call that found nobody waiting, so it may wait although the queue is full."""
    cache_salt: str = ""
    """Only requests of the same salt share prefixes of their prompts."""
    grammar: Grammar | None = None
    """What each continuation must be, which ends with "stop" where nothing can follow. Its log-probabilities are then
    those among the allowed tokens, as vLLM has it."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_CONTINUATIONS:
            raise InputError(f"n is {self.n}; it must be from 1 to {MAX_CONTINUATIONS}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise InputError(f"{name} is {value}; it must be from 0 to {MAX_LOGPROBS}")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}; it must be above 0 seconds")

    def seed(self, index: int) -> int:
        """The seed that continuation `index` draws with."""
        return (self.params.seed + index) % (MAX_SEED + 1)


@dataclass(frozen=True)
class Logprobs:
    """A token's log-probability (nats) and the most likely tokens at its position, as (id, nats), descending."""

    own: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1
    """How many tokens are at least as likely, itself among them."""


@dataclass(frozen=True)
class PromptEvent:
    """The prompt has been read. The first event of every request that is not ended before."""

    cached_tokens: int
    """How many of its tokens were found in the cache and not computed again."""
    logprobs: tuple[Logprobs | None, ...] | None = None
    """One for each prompt token, None for the first; None altogether where `prompt_logprobs` is None."""


@dataclass(frozen=True)
class TokenEvent:
    """One token of continuation `index`. `text` is what is certain by now: "" inside a character or a stop text."""

    index: int
    token_id: int
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class FinishEvent:
    """The last event of continuation `index`.

    `text` is the rest of its text. `stopped_by` is the stop text or token id that ended it, if one did (the
    end-of-text token included). `message` is one sentence where `reason` is "error" or "timeout"; with `by_request` the
    error is the request's own fault, and the sentence is for its caller.
    """

    index: int
    reason: FinishReason
    text: str = ""
    stopped_by: str | int | None = None
    message: str = ""
    by_request: bool = False


Event = PromptEvent | TokenEvent | FinishEvent
Listener = Callable[[Event], None]
"""Called in the engine's own thread, in order; must return at once and may not raise."""


@dataclass(frozen=True)
class EngineStats:
    """The engine now, and what it did since it began."""

    slots: int
    active_slots: int
    waiting_requests: int
    cache_tokens: int
    """Positions of the cache that running requests hold, of `cache_capacity`."""
    cache_capacity: int
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    drafted_prompt_tokens: int = 0
    accepted_prompt_tokens: int = 0
    """Tokens that prompt lookup drafted for verify steps, and those of them that were right."""
    drafted_ngram_tokens: int = 0
    accepted_ngram_tokens: int = 0
    """The same of the bundle's n-gram table."""
    replayed_tokens: int = 0
    """Positions that were decoded again because a token was not certain."""


@dataclass(frozen=True)
class RequestRecord:
    """One ended request, for metrics: seconds of the monotonic clock, tokens, outcome."""

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    arrived: float
    scheduled: float | None
    """When its prompt was first worked on; None if it never was."""
    first_token: float | None
    finished: float


@dataclass(frozen=True)
class StepRecord:
    """One step: number of decoded rows, number of prefilled prompt tokens, and duration in seconds."""

    decoded_rows: int
    prompt_tokens: int
    seconds: float
    inter_token: tuple[float, ...] = field(default=())
    """For each token given out that was not its continuation's first, seconds since the one before."""


class Observer(Protocol):
    """Told of what happens, in the engine's thread; must return at once and may not raise."""

    def on_step(self, record: StepRecord) -> None:
        """A step has ended."""

    def on_finish(self, record: RequestRecord) -> None:
        """All continuations of a request have ended."""


class Handle(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """Free its slots within one step; its continuations end with "cancelled". May be called any time, from any
        thread, more than once."""


class Engine(Protocol):
    """One model, served. `submit`, `stats` and `Handle.cancel` may be called from any thread."""

    vocab_size: int
    n_positions: int
    eos_token_id: int
    tokenizer: Tokenizer
    unsupported: frozenset[str]
    """What this engine cannot do, by the names of the fields of GenerationRequest and SamplingParams; using one is an
    InputError of `submit`."""

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        """Take `request` in: from here on it ends with one FinishEvent for each continuation, whatever happens.

        Raises InputError for what can never be served (ids outside the vocabulary, no room for a token, more
        continuations than slots), QueueFullError, and DrainingError.
        """

    def stats(self) -> EngineStats:
        """Counts that belong together, taken between two steps."""

    def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait until all running and queued ones have ended and return True.

        After `timeout` seconds the rest end with "timeout" and the result is False.
        """

    def close(self) -> None:
        """End what still runs with "cancelled" and give everything back. May be called more than once."""
