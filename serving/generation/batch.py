"""Generation on any backend: one prefill, then decode steps until every row has ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.backends.base import Backend, FloatArray
from serving.errors import InputError
from serving.generation.token_selection import open_host_steps, open_steps
from serving.sampling import SamplingParams
from serving.sampling.constraints import TokenConstraint

OnLogits = Callable[[int, int, FloatArray], None]


@dataclass(frozen=True)
class Generation:
    """The output of one prompt.

    `token_ids` ends with the token that ended it, if one did. `finish_reason` is "stop" for the end-of-text token, one
    of `stop_token_ids`, or a caller that said so, "length" for `max_new_tokens` or the end of the context.
    """

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def generate(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams] | SamplingParams,
    eos_token_id: int,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_logits: OnLogits | None = None,
) -> list[Generation]:
    """Continue each of `prompts` (token ids, any lengths) and return one Generation for each, in order.

    `params` is one for all or one for each; its `stop` strings are text and not looked at here. `on_token` is called
    with (prompt index, token id) for every new token and ends that row by returning True. Before it, `on_logits` is
    called with (prompt index, token id, logits): the logits [vocab_size] that the token was sampled from, as the model
    gave them, without bias and penalties. The next step may overwrite them.

    A prompt and its output fill at most `n_positions`. All rows run as one batch, in which ended rows get dummy
    tokens. If those would exceed the context, the rows run as several batches, shorter prompts first. Raises InputError
    for an empty prompt, one that leaves no room for a token, and a token id outside the vocabulary.
    """
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(every) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(every)} sets of sampling parameters; give one for each")
    budgets = [
        token_budget(f"prompt {index}", prompt, every[index], backend.vocab_size, backend.n_positions)
        for index, prompt in enumerate(prompts)
    ]
    ends = [each.end_ids(eos_token_id) for each in every]
    tokens: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for rows in _batches(backend, prompts, budgets):
        live = [True] * len(rows)
        batch = [prompts[row] for row in rows]
        limits = [budgets[row] for row in rows]
        for place, token, logits in _steps(
            backend, batch, [every[row] for row in rows], limits, live, eos_token_id, on_logits is not None
        ):
            row = rows[place]
            if on_logits is not None and logits is not None:
                on_logits(row, token, logits)
            tokens[row].append(token)
            said_so = on_token is not None and on_token(row, token) is True
            if said_so or token in ends[row]:
                stopped[row] = True
                live[place] = False
    return [Generation(tuple(ids), "stop" if ended else "length") for ids, ended in zip(tokens, stopped, strict=True)]


def stream(
    backend: Backend,
    prompt: Sequence[int],
    params: SamplingParams,
    eos_token_id: int,
    on_logits: OnLogits | None = None,
    constraint: TokenConstraint | None = None,
) -> Iterator[int]:
    """Continue one prompt and yield each token id as soon as it is sampled, the one that ends it included.

    The tokens are those of `generate`, and so are the errors, which are raised here and not at the first token. With a
    `constraint`, only what it allows is chosen, the text also ends where it is done, and the iterator may raise
    ConstraintError.
    """
    budget = token_budget("prompt 0", prompt, params, backend.vocab_size, backend.n_positions)
    ends = params.end_ids(eos_token_id)

    def tokens() -> Iterator[int]:
        wanted = on_logits is not None
        for row, token, logits in _steps(
            backend, [prompt], [params], [budget], [True], eos_token_id, wanted, constraint
        ):
            if on_logits is not None and logits is not None:
                on_logits(row, token, logits)
            yield token
            if token in ends or (constraint is not None and constraint.done):
                return

    return tokens()


def token_budget(
    name: str,
    prompt: Sequence[int],
    params: SamplingParams,
    vocab_size: int,
    length: int,
    prompt_only: bool = False,
) -> int:
    """Tokens that `prompt` may be continued by in a context of `length`, 0 with `prompt_only`; errors say `name`.

    Raises InputError for an empty prompt, one that leaves no room, and a token id outside the vocabulary.
    """
    if not prompt:
        raise InputError(f"{name} is empty; start it with the end-of-text token")
    room, needed = length - len(prompt), 0 if prompt_only else 1
    if room < needed:
        raise InputError(
            f"{name} has {len(prompt)} tokens, which leaves no room in a context of {length}; "
            f"shorten it to {length - needed}"
        )
    bias_ids = params.biases[0]
    for what, ids in (
        ("", prompt),
        # In ascending order, and many at most once for all prompts of a call.
        ("the logit_bias of ", bias_ids[[0, -1]].tolist() if len(bias_ids) else ()),
        ("the stop_token_ids of ", params.stop_token_ids),
    ):
        if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
            continue
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        raise InputError(
            f"{what}{name} has the token id {outside}, outside the vocabulary of {vocab_size}; "
            "use the bundle's own tokenizer"
        )
    return 0 if prompt_only else min(params.max_new_tokens, room)


def _batches(backend: Backend, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[list[int]]:
    """Group rows so that in each group the longest prompt and the most steps fit the context together."""
    batches: list[list[int]] = []
    steps = 0
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        steps = max(steps, budgets[row] - 1)
        if not batches or len(prompts[row]) + steps > backend.n_positions:
            batches.append([])
            steps = budgets[row] - 1
        batches[-1].append(row)
    return [sorted(batch) for batch in batches]


def _steps(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    budgets: Sequence[int],
    live: list[bool],
    eos_token_id: int,
    with_logits: bool,
    constraint: TokenConstraint | None = None,
) -> Iterator[tuple[int, int, FloatArray | None]]:
    """Give (row, token, its logits) for each new token; the caller ends a row by setting its `live` to False.

    The logits are None without `with_logits`. `constraint` is that of a single prompt.
    """
    capacity = min(backend.n_positions, max(map(len, prompts)) + max(budgets))
    # Only these steps bring logits to the host.
    wanted = with_logits or constraint is not None
    host = open_host_steps(backend, prompts, params, capacity, eos_token_id, constraint) if wanted else None
    steps = host or open_steps(backend, prompts, params, capacity, eos_token_id)
    for step in itertools.count():
        rows = np.flatnonzero(live)
        tokens = steps.sample_tokens(rows, step)
        for row in rows.tolist():
            # Before the caller sees the token, so that the caller can end the row.
            live[row] = step + 1 < budgets[row]
            yield row, int(tokens[row]), host.logits[row] if host is not None and with_logits else None
        if not any(live):
            return
        steps.feed(tokens)
