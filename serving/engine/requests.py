"""A running request and its sequences, as the engine's own thread keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.backends.base import FloatArray
from serving.engine.api import GenerationRequest, Listener, Logprobs
from serving.generation.drafts import Drafter
from serving.generation.pacing import Pace
from serving.sampling import SamplingParams
from serving.sampling.constraints import TokenConstraint, ends_without_text
from serving.sampling.detokenizer import TextStream, TokenBytes
from serving.sampling.penalties import PenaltyState


@dataclass(eq=False)
class Slot:
    """One row of the KV cache.

    `filled` positions are in use. The first `len(tokens)` of them are a reusable prefix: they have the same bits as a
    prefill of those tokens in whole chunks. `used` counts up with each sequence that starts in a slot.
    """

    index: int
    tokens: tuple[int, ...] = ()
    filled: int = 0
    sequence: EngineSequence | None = None
    used: int = 0
    salt: str = ""
    """Only requests with this salt may reuse the prefix."""


@dataclass
class SpeculationState:
    """What speculation knows of one sequence.

    Positions from `inexact` on were written by verify steps, or after them; None where all are exact. During a replay,
    `target` is the position of the token after which the next one is sampled.
    """

    drafter: Drafter
    pace: Pace
    inexact: int | None = None
    target: int | None = None


@dataclass(eq=False)
class EngineSequence:
    """One output sequence of a request."""

    request: EngineRequest
    index: int
    params: SamplingParams
    """Those of the request, shared by its sequences, which differ in `seed`."""
    seed: int
    text: TextStream
    penalty_state: PenaltyState | None
    """None without bias and penalties."""
    constraint: TokenConstraint | None = None
    slot: Slot | None = None
    last_token: int = 0
    """The token that the next step feeds."""
    num_generated: int = 0
    """Number of tokens sampled so far."""
    tokens: list[int] = field(default_factory=list)
    """The tokens sampled so far."""
    speculation: SpeculationState | None = None
    """None until the sequence first runs alone in an engine that speculates."""
    last_time: float | None = None
    ended: bool = False


@dataclass(eq=False)
class EngineRequest:
    """A request, from its submission to the end of its last sequence.

    `holding` sequences have the whole prompt in their slots. The next one has its first `num_prefilled` tokens.
    `scores` are the prompt's log-probabilities as far as they are known, or None if the request does not want them.
    """

    submitted: GenerationRequest
    listener: Listener
    arrived: float
    deadline: float | None
    max_new_tokens: int
    end_ids: frozenset[int]
    sequences: list[EngineSequence] = field(default_factory=list)
    num_prefilled: int = 0
    holding: int = 0
    cached: int = 0
    scores: list[Logprobs | None] | None = None
    scheduled: float | None = None
    first_token: float | None = None
    num_generated: int = 0
    logits: FloatArray | None = None
    """Those after the prompt, [vocab_size], between its last chunk and the first token."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The request's prompt."""
        return self.submitted.prompt

    @property
    def first(self) -> EngineSequence:
        """The sequence whose slot receives the prefill."""
        return self.sequences[0]

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still missing."""
        return self.scores is not None and len(self.scores) < len(self.prompt)


def open_engine_request(
    submitted: GenerationRequest,
    listener: Listener,
    arrived: float,
    timeout: float | None,
    max_new_tokens: int,
    eos_token_id: int,
    token_bytes: TokenBytes,
) -> EngineRequest:
    """The engine's state of `submitted`, each of whose sequences may have `max_new_tokens` tokens.

    Its sequences share stop automaton and biases: a request may have many sequences, long stop texts and a bias for
    each token.
    """
    params = submitted.params
    deadline = None if timeout is None else arrived + timeout
    request = EngineRequest(submitted, listener, arrived, deadline, max_new_tokens, params.end_ids(eos_token_id))
    if submitted.prompt_logprobs is not None:
        request.scores = [None]
    penalty_state = PenaltyState([submitted.prompt], [params], eos_token_id)
    ends = ends_without_text(params, eos_token_id, token_bytes.special)
    for index in range(submitted.n):
        text = TextStream(token_bytes, params.stop_automaton)
        own = None if penalty_state.empty else penalty_state.copy()
        constraint = None if submitted.grammar is None else submitted.grammar.start(ends)
        request.sequences.append(EngineSequence(request, index, params, submitted.seed(index), text, own, constraint))
    return request
