"""What a step does, counted in calls of the backend and not in seconds."""

from __future__ import annotations

import pytest

from tests.closed_form import greedy
from tests.serving.engine.harness import Heard, Stepped


def names(engine: Stepped, name: str) -> list[int]:
    return [size for each, size in engine.backend.calls if each == name]


def running(engine: Stepped, count: int, tokens: int = 500) -> list[Heard]:
    """`count` streams that have begun to decode."""
    streams = [engine.submit([7 + index], max_new_tokens=tokens, ignore_eos=True)[0] for index in range(count)]
    while not all(stream.tokens for stream in streams):
        engine.engine.step()
    engine.backend.calls.clear()
    return streams


def test_a_long_prompt_costs_running_streams_one_chunk_a_step() -> None:
    engine = Stepped(length=1024, chunk=32, max_num_batched_tokens=512)
    streams = running(engine, 3)
    long, _ = engine.submit(list(range(225)) * 4, max_new_tokens=3, ignore_eos=True)
    for step in range(29):
        before = [len(stream.ids()) for stream in streams]
        assert (long.prompt is not None) == (step > 28)
        engine.engine.step()
        assert [len(stream.ids()) for stream in streams] == [count + 1 for count in before]
        assert engine.backend.calls == [("prefill", 32 if step < 28 else 4), ("decode", 3)]
        engine.backend.calls.clear()
    assert long.prompt is not None and len(long.ids()) == 1
    assert [record.prompt_tokens for record in engine.observed.steps[-29:]] == [32] * 28 + [4]
    engine.run()
    for index, stream in enumerate(streams):
        assert stream.ids() == greedy([7 + index], 500, 257)
    assert long.ids() == greedy(list(range(225)) * 4, 3, 257)


def test_a_step_batches_no_more_tokens_than_it_may() -> None:
    engine = Stepped(length=1024, chunk=64, max_num_batched_tokens=40)
    streams = running(engine, 3)
    long, _ = engine.submit(list(range(222)), max_new_tokens=1, ignore_eos=True)
    while not long.done:
        engine.engine.step()
    records = [record for record in engine.observed.steps if record.prompt_tokens and record.decoded_rows]
    assert [record.prompt_tokens for record in records] == [37] * 6
    assert all(record.decoded_rows + record.prompt_tokens == 40 for record in records)
    engine.run()
    assert streams[0].ids() == greedy([7], 500, 257) and long.ids() == greedy(list(range(222)), 1, 257)


def test_with_nothing_to_decode_a_step_reads_up_to_its_budget() -> None:
    engine = Stepped(length=256, chunk=8, max_num_batched_tokens=64)
    heard = [engine.submit(list(range(start, start + 50)), max_new_tokens=1)[0] for start in (0, 50, 100)]
    engine.engine.step()
    assert [each.done for each in heard] == [True, False, False] and names(engine, "prefill") == [50, 14]
    engine.engine.step()
    assert [each.done for each in heard] == [True, True, False] and names(engine, "prefill")[2:] == [36, 20]
    assert sum(names(engine, "prefill")[2:]) + 8 == 64 and len(names(engine, "copy")) == 1  # Which counts as a chunk.
    engine.run()
    assert sum(names(engine, "prefill")) == 150 and not names(engine, "decode")


def test_with_nothing_to_decode_chunks_are_one_piece_but_for_a_single_last_token() -> None:
    # Without copies, which would count against a step's budget.
    engine = Stepped(slots=2, chunk=8, length=256, max_num_batched_tokens=32, copies=False)
    for start, (length, pieces) in enumerate([
        (1, [1]), (9, [8, 1]), (19, [19]), (33, [32, 1]), (34, [32, 2]), (70, [32, 32, 6]), (81, [32, 32, 16, 1]),
    ]):  # fmt: skip
        engine.backend.calls.clear()
        prompt = [50 + start] * length
        heard, _ = engine.submit(prompt, max_new_tokens=2, ignore_eos=True)
        engine.run()
        assert names(engine, "prefill") == pieces
        assert heard.ids() == greedy(prompt, 2, 257)


def test_chunks_of_one_token_are_read_one_by_one() -> None:
    engine = Stepped(chunk=1)
    for cached in (0, 4):
        heard, _ = engine.submit([5, 6, 7, 8, 9], max_new_tokens=3, ignore_eos=True)
        engine.run()
        assert heard.prompt is not None and heard.prompt.cached_tokens == cached
        assert heard.ids() == greedy([5, 6, 7, 8, 9], 3, 257)
    assert names(engine, "prefill") == [1] * 6


def test_first_come_first_served_and_nobody_overtakes_one_who_waits_for_more_slots() -> None:
    engine = Stepped(slots=4)
    streams = running(engine, 2, tokens=20)
    wide, _ = engine.submit([1, 2], n=3, max_new_tokens=2, ignore_eos=True)
    narrow, _ = engine.submit([3], max_new_tokens=2, ignore_eos=True)
    for _ in range(10):
        engine.engine.step()
    assert wide.prompt is None and narrow.prompt is None
    engine.run()
    assert all(each.done for each in (*streams, wide, narrow))
    order = {record.prompt_tokens: record.scheduled for record in engine.observed.finished}
    assert len(order) == 2


def test_continuations_of_one_prompt_share_its_reading() -> None:
    engine = Stepped(slots=4, chunk=8)
    heard, _ = engine.submit(list(range(19)), n=4, temperature=20.0, seed=2**63 - 2, max_new_tokens=9, ignore_eos=True)
    engine.run()
    assert names(engine, "prefill") == [19] and names(engine, "copy") == [19] * 3
    assert len({tuple(heard.ids(index)) for index in range(4)}) == 4


def test_copies_for_continuations_are_made_one_a_step_beside_a_stream() -> None:
    engine = Stepped(slots=4, chunk=8)
    running(engine, 1)
    heard, _ = engine.submit(list(range(8)), n=3, max_new_tokens=2)
    per_step = []
    while not heard.done:
        engine.backend.calls.clear()
        engine.engine.step()
        per_step.append([name for name, _ in engine.backend.calls])
    assert per_step[:3] == [["prefill", "decode"], ["copy", "decode"], ["copy", "decode"]]


def test_a_prefix_is_taken_over_in_place_and_from_others() -> None:
    engine = Stepped(slots=3, chunk=8)
    start = list(range(100, 120))
    first, _ = engine.submit([*start, 1, 2], max_new_tokens=3, ignore_eos=True)
    engine.run()
    engine.backend.calls.clear()
    # In place: its slot is free.
    second, _ = engine.submit([*start, 9], max_new_tokens=30, ignore_eos=True)
    engine.engine.step()
    assert engine.backend.calls == [("prefill", 5)]
    engine.backend.calls.clear()
    # From a slot that is busy: only what is used is copied.
    third, _ = engine.submit([*start, 4, 5], max_new_tokens=3, ignore_eos=True)
    engine.run()
    assert names(engine, "copy") == [16] and names(engine, "prefill") == [6]
    assert [each.prompt.cached_tokens for each in (first, second, third) if each.prompt] == [0, 16, 16]
    assert engine.engine.stats().cached_prompt_tokens == 32
    for heard in (first, second, third):
        prompt = list(heard.request.prompt)
        assert heard.ids() == greedy(prompt, len(heard.ids()), 257)


def test_a_whole_prompt_that_is_there_is_still_read_at_its_end() -> None:
    engine = Stepped(chunk=8)
    for cached in (0, 8):
        heard, _ = engine.submit(list(range(16)), max_new_tokens=2, ignore_eos=True)
        engine.run()
        assert heard.prompt is not None and heard.prompt.cached_tokens == cached


def test_two_prompts_in_turn_both_stay() -> None:
    """One at a time always lands in the lowest slot: what it held moves to an unused one."""
    engine = Stepped(slots=3, chunk=8)
    prompts = [list(range(start, start + 20)) for start in (0, 50)]
    cached = []
    for prompt in prompts * 3:
        heard, _ = engine.submit(prompt, max_new_tokens=2, ignore_eos=True)
        engine.run()
        assert heard.prompt is not None
        cached.append(heard.prompt.cached_tokens)
    assert cached == [0] * 2 + [16] * 4


def test_the_oldest_prefix_gives_way() -> None:
    engine = Stepped(slots=2, chunk=8)

    def ask(start: int) -> int:
        heard, _ = engine.submit(list(range(start, start + 20)), max_new_tokens=2, ignore_eos=True)
        engine.run()
        assert heard.prompt is not None
        return heard.prompt.cached_tokens

    assert [ask(start) for start in (0, 50, 0, 100, 0, 50)] == [0, 0, 16, 0, 16, 0]


def test_without_copies_a_prefix_is_found_in_free_slots_only() -> None:
    engine = Stepped(slots=3, chunk=8, copies=False)
    prompt = list(range(20))
    first, _ = engine.submit(prompt, n=2, max_new_tokens=4, ignore_eos=True)
    second, _ = engine.submit(prompt, max_new_tokens=4, ignore_eos=True)
    engine.run()
    third, _ = engine.submit(prompt, max_new_tokens=4, ignore_eos=True)
    engine.run()
    assert [each.prompt.cached_tokens for each in (first, second, third) if each.prompt] == [0, 0, 16]
    assert all(each.ids() == greedy(prompt, 4, 257) for each in (first, second, third))


@pytest.mark.parametrize("copies", [True, False])
def test_rows_stay_dense_by_moving_one_a_step(copies: bool) -> None:
    engine = Stepped(slots=4, length=256, copies=copies)
    prompts = [[10 + index] * 17 for index in range(4)]
    streams = [engine.submit(prompt, max_new_tokens=100, ignore_eos=True) for prompt in prompts]
    while not all(heard.tokens for heard, _ in streams):
        engine.engine.step()
    streams[0][1].cancel()
    streams[1][1].cancel()
    engine.backend.calls.clear()
    for _ in range(4):
        engine.engine.step()
    widths = [3, 2, 2, 2] if copies else [4] * 4
    assert names(engine, "decode") == widths
    moves = [size for size in names(engine, "copy") if size >= 17]
    assert len(moves) == (2 if copies else 0)
    again, _ = engine.submit([*prompts[1], 5], max_new_tokens=2)
    engine.run()
    for (heard, _), prompt in list(zip(streams, prompts, strict=True))[2:]:
        assert heard.ids() == greedy(prompt, 100, 257)
    # The older of the two prefixes gave way; the other was moved to the slot that became free.
    assert again.prompt is not None and again.prompt.cached_tokens == 16
    engine.check_idle()


def test_a_row_moves_to_an_empty_hole_before_one_that_holds_a_prefix() -> None:
    engine = Stepped(slots=4, length=256)
    streams = [engine.submit([10 + index] * size, max_new_tokens=100, ignore_eos=True)
               for index, size in enumerate((17, 5, 5))]  # fmt: skip
    while not all(heard.tokens for heard, _ in streams):
        engine.engine.step()
    for _, handle in streams[:2]:
        handle.cancel()
    engine.backend.calls.clear()
    engine.engine.step()
    ((_, moved),) = [call for call in engine.backend.calls if call[0] == "copy"]
    assert moved >= 5 and names(engine, "decode") == [2]


def test_no_row_moves_while_there_are_prompts_to_read() -> None:
    engine = Stepped(slots=4, length=256)
    prompts = [[10], [11], [12] * 17]
    streams = [engine.submit(prompt, max_new_tokens=100, ignore_eos=True) for prompt in prompts]
    while not all(heard.tokens for heard, _ in streams):
        engine.engine.step()
    for _, handle in streams[:2]:
        handle.cancel()
    # Its beginning is copied from the row that might move.
    engine.submit([*prompts[2], 1], max_new_tokens=9, ignore_eos=True)
    engine.backend.calls.clear()
    engine.engine.step()
    assert engine.backend.calls == [("copy", 16), ("decode", 3)]


def test_a_slot_says_no_more_of_a_copy_than_was_copied() -> None:
    engine = Stepped(slots=3, length=256)
    below, handle = engine.submit([1], max_new_tokens=99, ignore_eos=True)
    prompt = list(range(100, 120))
    source, _ = engine.submit(prompt, max_new_tokens=99, ignore_eos=True)
    while not source.tokens:
        engine.engine.step()
    handle.cancel()
    _, part = engine.submit([*prompt[:8], *range(20)], max_new_tokens=9)
    engine.backend.calls.clear()
    engine.engine.step()
    assert below.done and engine.backend.calls == [("copy", 8), ("decode", 2)]
    part.cancel()
    whole, _ = engine.submit([*prompt, 5], max_new_tokens=9, ignore_eos=True)
    engine.run()
    assert whole.prompt is not None and whole.prompt.cached_tokens == 16
    assert whole.ids() == greedy([*prompt, 5], 9, 257)


def test_what_another_slot_begins_with_is_not_saved() -> None:
    engine = Stepped(slots=3, chunk=8)
    short, long = [1] * 9, [1] * 17
    engine.submit(long, max_new_tokens=9, ignore_eos=True)
    engine.submit(short, max_new_tokens=2, ignore_eos=True)
    engine.run()
    engine.backend.calls.clear()
    for start in (20, 40, 60):
        engine.submit([start] * 9, max_new_tokens=2, ignore_eos=True)
    engine.run()
    assert names(engine, "copy") == [16], "of the two only the longer is kept, and it once"


def test_a_row_that_ends_soon_is_not_moved() -> None:
    engine = Stepped(slots=2, length=256)
    short, handle = engine.submit([1], max_new_tokens=200, ignore_eos=True)
    long, _ = engine.submit([2] * 150, max_new_tokens=3, ignore_eos=True)
    while not long.tokens:
        engine.engine.step()
    handle.cancel()
    engine.backend.calls.clear()
    engine.run()
    assert not names(engine, "copy") and names(engine, "decode") == [2, 2] and short.done
