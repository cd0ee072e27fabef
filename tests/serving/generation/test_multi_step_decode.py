"""Blocks of steps in the graph give the tokens of one step at a time, whatever ends or cannot be decided within one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.devices import batch_bucket, capacity_bucket, cuda_options, parse_device
from serving.backends.onnx import OnnxBackend
from serving.bundle import Bundle, open_bundle
from serving.errors import InputError
from serving.generation import generate, token_selection
from serving.generation.multi_step_decode import MultiStepSteps
from serving.sampling import SamplingParams

END = 256
PROMPTS = [[5, 9, 200], [7], list(range(30)), [80, 81], [9, 9]]
GREEDY = SamplingParams(max_new_tokens=17, ignore_eos=True)
MIXED = [
    SamplingParams(max_new_tokens=17, temperature=0.8, top_k=20, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=5),
    SamplingParams(max_new_tokens=18, temperature=1.2, min_p=0.05, seed=9),
    SamplingParams(max_new_tokens=18, temperature=1.0, seed=2**62),
    SamplingParams(max_new_tokens=11, top_k=1, temperature=1.0),
]


@pytest.fixture(scope="module")
def bundle(real_bundle: Path) -> Bundle:
    return open_bundle(real_bundle)


@pytest.fixture(scope="module")
def blocks(bundle: Bundle) -> OnnxBackend:
    """Blocks of up to 5 steps on the processor."""
    return OnnxBackend(bundle, steps_per_fetch=5)


class Watched:
    """A loop that counts its runs, and may call tokens not exact that are."""

    def __init__(self, loop: Any, doubt: float = 0.0) -> None:
        self.loop, self.doubt = loop, doubt
        self.runs: list[int] = []
        self.random = np.random.default_rng(4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def run(self, state: Any, count: int, *rest: Any) -> Any:
        self.runs.append(count)
        tokens = self.loop.run(state, count, *rest)
        doubted = self.random.random(tokens.shape) < self.doubt
        return np.where(doubted & (tokens >= 0), -1 - tokens, tokens)


def watch(backend: OnnxBackend, monkeypatch: pytest.MonkeyPatch, doubt: float = 0.0) -> dict[bool, Watched]:
    loops = {sampled: Watched(OnnxBackend.loop(backend, sampled), doubt) for sampled in (False, True)}
    monkeypatch.setattr(backend, "loop", lambda sampled: loops[sampled])
    return loops


@pytest.mark.parametrize("params", [GREEDY, MIXED])
def test_blocks_give_the_tokens_of_single_steps(
    params: Any, bundle: Bundle, blocks: OnnxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = params is MIXED
    loops = watch(blocks, monkeypatch)
    results = generate(blocks, PROMPTS, params, END)
    runs = loops[sampled].runs
    assert runs[:3] == [5, 5, 5] and not loops[not sampled].runs
    singles = OnnxBackend(bundle, steps_per_fetch=2)
    assert generate(singles, PROMPTS, params, END) == results
    if not sampled:
        # Attention is 16-bit in the loop and float32 in the graph that the host steps: near, and here the same. A draw
        # may lie between the two; what the host draws from the loop's own logits is compared below.
        assert generate(OnnxBackend(bundle), PROMPTS, params, END) == results
    assert len({each.token_ids for each in results}) > 2


@pytest.mark.parametrize("doubt", [0.1, 1.0])
@pytest.mark.parametrize("params", [GREEDY, MIXED])
def test_what_is_not_exact_is_chosen_here_and_made_again(
    params: Any, doubt: float, blocks: OnnxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(blocks, PROMPTS, params, END)
    loops = watch(blocks, monkeypatch, doubt)
    assert generate(blocks, PROMPTS, params, END) == plain
    runs = loops[params is MIXED].runs
    # In vain at every step, blocks are given up.
    assert set(runs[2:]) == {1} if doubt == 1 else max(runs) == 5


def test_a_stop_in_the_middle_of_a_block_ends_it(blocks: OnnxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(blocks, PROMPTS[:2], GREEDY, END)
    loops = watch(blocks, monkeypatch)
    counts = [0, 0]

    def stop(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] == (7, 3)[row]

    ended = generate(blocks, PROMPTS[:2], GREEDY, END, stop)
    assert [each.token_ids for each in ended] == [whole[0].token_ids[:7], whole[1].token_ids[:3]]
    assert loops[False].runs == [5, 5] and {each.finish_reason for each in ended} == {"stop"}


def test_other_tokens_than_the_chosen_ones_may_be_fed(blocks: OnnxBackend) -> None:
    """As a caller does that forces a token: what was made behind it counts no more."""
    chooser = token_selection.BatchSampler(PROMPTS, [GREEDY] * 5)
    rows = np.arange(5)
    steps = MultiStepSteps(blocks.loop(False), blocks.vocab_size, chooser, PROMPTS, 48)
    first = steps.sample_tokens(rows, 0)
    steps.feed((first + 1) % 256)
    forced = [[*prompt, int(token + 1) % 256] for prompt, token in zip(PROMPTS, first, strict=True)]
    again = MultiStepSteps(
        blocks.loop(False), blocks.vocab_size, token_selection.BatchSampler(forced, [GREEDY] * 5), forced, 48
    )
    np.testing.assert_array_equal(steps.sample_tokens(rows, 1), again.sample_tokens(rows, 0))


def test_batches_end_at_the_context(blocks: OnnxBackend) -> None:
    long = [1] * (blocks.n_positions - 4)
    (result,) = generate(blocks, [long], SamplingParams(max_new_tokens=99, ignore_eos=True), END)
    assert len(result.token_ids) == 4 and result.finish_reason == "length"


def test_an_arena_is_used_again_and_two_states_have_two(blocks: OnnxBackend) -> None:
    loop = blocks.loop(False)
    assert loop is not None
    one = loop.open([[1]], 20)
    two = loop.open([[2]], 20)
    assert one.arena is not two.arena
    first = loop.run(one, 3, None, None)
    arena, _ = one.arena, loop.run(two, 3, None, None)
    del one
    again = loop.open([[1]], 20)
    assert again.arena is arena
    np.testing.assert_array_equal(loop.run(again, 3, None, None), first)


def test_penalties_go_step_by_step(blocks: OnnxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = watch(blocks, monkeypatch)
    generate(blocks, PROMPTS[:1], SamplingParams(max_new_tokens=4, repetition_penalty=1.3), END)
    generate(blocks, PROMPTS[:1], SamplingParams(max_new_tokens=4, temperature=1.0, top_k=1000), END)
    assert not loops[False].runs and not loops[True].runs


def test_devices_buckets_and_options() -> None:
    assert parse_device("cpu") == ("cpu", 0) and parse_device("cuda:3") == ("cuda", 3)
    for wrong in ("cuda:", "cuda:x", "cpu:1", "cud"):
        with pytest.raises(InputError, match="no device"):
            parse_device(wrong)
    assert [batch_bucket(rows) for rows in (1, 3, 256, 300)] == [1, 4, 256, 300]
    assert [capacity_bucket(each, 1000) for each in (1, 128, 129, 999)] == [128, 128, 256, 1000]
    assert cuda_options(2, True)["device_id"] == "2" and cuda_options(0)["enable_cuda_graph"] == "0"


def test_the_loop_needs_at_least_one_step(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="steps_per_fetch is 0"):
        OnnxBackend(bundle, steps_per_fetch=0)
