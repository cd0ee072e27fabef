"""A running request and its sequences, as the engine's own thread keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.backends.base import FloatArray
from serving.engine.api import GenerationRequest, Listener, Logprobs
from serving.sampling import SamplingParams
from serving.sampling.constraints import TokenConstraint
from serving.sampling.detokenizer import TextStream, TokenBytes
from serving.sampling.penalties import History


@dataclass(eq=False)
class Slot:
    """One row of the KV cache.

    `filled` positions are in use. The first `len(tokens)` of them are a reusable prefix: they have the same bits as a
    prefill of those tokens in whole chunks. `used` counts up with each sequence that starts in a slot.
    """

    index: int
    tokens: tuple[int, ...] = ()
    filled: int = 0
    owner: Continuation | None = None
    used: int = 0
    salt: str = ""
    """Only requests with this salt may reuse the prefix."""


@dataclass(eq=False)
class Continuation:
    """One output sequence of a request."""

    task: Task
    index: int
    params: SamplingParams
    """Those of the request, shared by its sequences, which differ in `seed`."""
    seed: int
    text: TextStream
    history: History | None
    """None without bias and penalties."""
    constraint: TokenConstraint | None = None
    slot: Slot | None = None
    last: int = 0
    """The token that the next step feeds."""
    made: int = 0
    """Number of tokens sampled so far."""
    last_time: float | None = None
    ended: bool = False


@dataclass(eq=False)
class Task:
    """A request, from its submission to the end of its last sequence.

    `holding` sequences have the whole prompt in their slots. The next one has its first `read` tokens.
    `scores` are the prompt's log-probabilities as far as they are known, or None if the request does not want them.
    """

    request: GenerationRequest
    listener: Listener
    arrived: float
    deadline: float | None
    budget: int
    end_ids: frozenset[int]
    continuations: list[Continuation] = field(default_factory=list)
    read: int = 0
    holding: int = 0
    cached: int = 0
    scores: list[Logprobs | None] | None = None
    scheduled: float | None = None
    first_token: float | None = None
    made: int = 0
    logits: FloatArray | None = None
    """Those after the prompt, [vocab_size], between its last chunk and the first token."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The request's prompt."""
        return self.request.prompt

    @property
    def first(self) -> Continuation:
        """The sequence whose slot receives the prefill."""
        return self.continuations[0]

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still missing."""
        return self.scores is not None and len(self.scores) < len(self.prompt)


def open_task(
    request: GenerationRequest,
    listener: Listener,
    arrived: float,
    timeout: float | None,
    budget: int,
    eos_token_id: int,
    token_bytes: TokenBytes,
) -> Task:
    """The engine's state of `request`, each of whose sequences may have `budget` tokens.

    Its sequences share stop automaton and biases: a request may have many sequences, long stop texts and a bias for
    each token.
    """
    params = request.params
    deadline = None if timeout is None else arrived + timeout
    task = Task(request, listener, arrived, deadline, budget, params.end_ids(eos_token_id))
    if request.prompt_logprobs is not None:
        task.scores = [None]
    history = History([request.prompt], [params], eos_token_id)
    for index in range(request.n):
        text = TextStream(token_bytes, params.stop_automaton)
        own = None if history.empty else history.copy()
        constraint = None if request.grammar is None else request.grammar.start()
        task.continuations.append(Continuation(task, index, params, request.seed(index), text, own, constraint))
    return task
