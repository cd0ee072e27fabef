"""Generation over the closed form: every token is known beforehand, alone and in company."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.backends.base import Backend
from serving.errors import InputError
from serving.generation import Generation, generate, stream
from serving.sampling import SamplingParams, sample_tokens
from tests.closed_form import ClosedFormBackend, greedy, logits_after

SIZE = 29
EOS = SIZE - 1
PROMPTS = st.lists(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=15), min_size=1, max_size=6)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 2**63 - 1),
    ignore_eos=st.booleans(),
)


def backend(n_positions: int = 16) -> ClosedFormBackend:
    return ClosedFormBackend(SIZE, n_positions)


def expected(prompt: list[int], params: SamplingParams, n_positions: int = 16) -> Generation:
    """One row by the definition, without a batch, a cache or a loop shared with the code under test."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_new_tokens and len(tokens) < n_positions:
        step = len(tokens) - len(prompt)
        logits = logits_after(tokens, SIZE)[None]
        tokens += sample_tokens(logits, params.temperature, params.top_k, params.top_p, params.seed, step).tolist()
        if tokens[-1] == EOS and not params.ignore_eos:
            return Generation(tuple(tokens[len(prompt) :]), "stop")
    return Generation(tuple(tokens[len(prompt) :]), "length")


@given(PROMPTS, st.data())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_together_is_alone(prompts: list[list[int]], data: st.DataObject) -> None:
    params = [data.draw(PARAMS) for _ in prompts]
    wanted = [expected(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    seen: list[list[int]] = [[] for _ in prompts]

    def on_token(row: int, token: int) -> None:
        seen[row].append(token)

    assert generate(backend(), prompts, params, EOS, on_token) == wanted
    assert [tuple(each) for each in seen] == [each.token_ids for each in wanted]
    for prompt, each, result in zip(prompts, params, wanted, strict=True):
        assert tuple(stream(backend(), prompt, each, EOS)) == result.token_ids


def test_greedy_is_the_closed_form() -> None:
    prompts = [[1, 2, 3], [7], [5, 5]]
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    device = backend(64)
    typed: Backend = device
    results = generate(typed, prompts, params, EOS)
    assert [list(each.token_ids) for each in results] == [greedy(prompt, 9, SIZE) for prompt in prompts]
    assert device.prefills == [(3, 12)] and device.decodes == 8


def test_the_loop_ends_when_every_row_has() -> None:
    device = backend(64)
    first = greedy([3], 40, SIZE)
    end = first[2]
    result = generate(device, [[3], [3]], SamplingParams(max_new_tokens=40), end)
    assert result == [Generation(tuple(first[: first.index(end) + 1]), "stop")] * 2
    assert device.decodes == first.index(end)


def test_a_caller_may_end_a_row() -> None:
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    results = generate(backend(64), [[1], [2]], params, EOS, on_token=lambda row, token: row == 1)
    assert results == [
        Generation(tuple(greedy([1], 6, SIZE)), "length"),
        Generation((greedy([2], 1, SIZE)[0],), "stop"),
    ]


def test_the_context_ends_a_row_and_never_another() -> None:
    device = backend(16)
    long, short = list(range(15)), [4]
    results = generate(device, [long, short], SamplingParams(max_new_tokens=99, ignore_eos=True), EOS)
    assert [len(each.token_ids) for each in results] == [1, 15]
    assert [each.finish_reason for each in results] == ["length", "length"]
    assert list(results[1].token_ids) == greedy(short, 15, SIZE)
    assert len(device.prefills) == 2


def test_errors_name_the_prompt_and_the_lengths() -> None:
    for prompts, message in [
        ([[1], []], "prompt 1 is empty"),
        ([list(range(16))], "prompt 0 has 16 tokens.* context of 16; shorten it to 15"),
        ([[1], [1, SIZE]], f"prompt 1 has the token id {SIZE}, outside the vocabulary of {SIZE}"),
        ([[-1]], "token id -1"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(backend(), prompts, SamplingParams(), EOS)
    with pytest.raises(InputError, match="2 prompts but 1 sets"):
        generate(backend(), [[1], [2]], [SamplingParams()], EOS)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        stream(backend(), [], SamplingParams(), EOS)
    assert generate(backend(), [], SamplingParams(), EOS) == []


def test_stream_gives_each_token_as_soon_as_it_is_chosen() -> None:
    device = backend(64)
    tokens = stream(device, [1], SamplingParams(max_new_tokens=5, ignore_eos=True), EOS)
    assert device.prefills == []
    for count in range(5):
        next(tokens)
        assert device.decodes == count
    assert list(tokens) == [] and device.decodes == 4
