"""The figures of a comparison, and the argument that proves greedy equality from one pass, on exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builder.verification.logit_parity import (
    Place,
    RuntimeReport,
    batches,
    compare_cached,
    greedy_tokens,
    reference_logits,
    window_losses_cached,
    window_losses_full,
)
from serving.backends.base import FloatArray, IntArray
from tests.closed_form import ClosedFormBackend, State, greedy, logits_after

VOCABULARY = 31
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def reference(token_ids: NDArray[np.int64]) -> FloatArray:
    """[rows, length, vocabulary]: the closed form after every prefix, padding included, as a real pass gives it."""
    return np.stack([np.stack([logits_after(row[: end + 1], VOCABULARY) for end in range(len(row))])
                     for row in token_ids.tolist()])  # fmt: skip


class Astray(ClosedFormBackend):
    """The closed form, spoilt by `change(logits, step)`; step 0 is the prefill."""

    def __init__(self, change: Callable[[FloatArray, int], None]) -> None:
        super().__init__(VOCABULARY)
        self.change, self.step = change, 0

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[State, FloatArray]:
        self.step = 0
        state, logits = super().prefill(prompts, capacity)
        self.change(logits, 0)
        return state, logits

    def decode(self, state: State, tokens: IntArray) -> FloatArray:
        self.step += 1
        logits = super().decode(state, tokens)
        self.change(logits, self.step)
        return logits


def place(reference: Any, ours: Any) -> Place:
    result = Place()
    result.compare(np.array(reference, np.float32), np.array(ours, np.float32), "batch 0, step 3")
    return result


def test_equal_rows() -> None:
    result = place([[1, 2], [4, 3]], [[1, 2], [4, 3]])
    assert result == Place(max_abs=0.0, rows=2, argmax_equal=2, ties=0, first_mismatch=None)
    assert result.mismatches == 0 and "first_mismatch" not in result.table()


def test_the_largest_difference_is_that_of_all_batches() -> None:
    result = place([[1, 2]], [[1, 2.5]])
    result.compare(np.array([[1.0, 2.0]], np.float32), np.array([[1.25, 2.0]], np.float32), "batch 1")
    assert (result.max_abs, result.rows, result.argmax_equal) == (0.5, 2, 2)


def test_another_choice_is_a_mismatch_that_is_named() -> None:
    # The two sides differ by as much as the choices lie apart, as they must for the choices to differ at all.
    result = place([[1, 2], [4, 3]], [[1, 2], [3, 4]])
    assert (result.argmax_equal, result.ties, result.mismatches) == (1, 0, 1)
    assert result.first_mismatch == "batch 0, step 3, row 1: token 1 where the reference has 0"


def test_the_first_mismatch_stays() -> None:
    result = place([[1, 2], [4, 3]], [[2, 1], [3, 4]])
    assert result.mismatches == 2 and result.first_mismatch is not None and "row 0" in result.first_mismatch


@pytest.mark.parametrize(
    ("gap", "tie"), [(0.0, True), (1e-5, True), (5e-5, True), (1e-4, False), (1e-3, False), (0.5, False)]
)
def test_a_tie_is_what_float32_cannot_decide(gap: float, tie: bool) -> None:
    """Beside a logit of -10, 64 roundings of float32 are 7.6e-5, whatever the other side says."""
    result = place([[1.0, 1.0 - gap, -10.0]], [[1.0 - gap, 1.0, -10.0]] if gap else [[1.0, 1.0001, -10.0]])
    assert (result.argmax_equal, result.ties, result.mismatches) == (0, int(tie), int(not tie))


def test_a_row_that_is_no_number_is_never_a_tie() -> None:
    result = place([[1.0, 1.0, 2.0]], [[1.0, 1.0, math.nan]])
    result.compare(np.array([[math.inf, 1.0]]), np.array([[1.0, 2.0]]), "batch 1")
    assert result.ties == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["ours", "reference"])
def test_what_is_no_number_counts_as_infinite(bad: float, side: str) -> None:
    good, spoilt = [[1.0, 2.0]], [[bad, 2.0]]
    with np.errstate(invalid="ignore"):
        result = place(good, spoilt) if side == "ours" else place(spoilt, good)
    assert result.max_abs == math.inf
    assert result.ties == 0
    problem = RuntimeReport({"prefill": result}).problem(1e9, 1.0)
    assert problem is not None and problem.startswith("prefill: logits differ by inf")


def test_not_a_number_on_both_sides_is_no_equality() -> None:
    result = place([[math.nan, 2.0]], [[math.nan, 2.0]])
    assert result.max_abs == math.inf


def test_a_report_names_the_place_that_fails_first() -> None:
    report = RuntimeReport()
    report.place("prefill").compare(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]), "batch 0, step 0")
    assert report.problem(0.0, 0.0) is None
    report.place("first_decode").compare(np.array([[0.0, 1.0]]), np.array([[0.0, 1.5]]), "batch 0, step 1")
    assert report.problem(0.5, 0.0) is None
    assert report.problem(0.4, 0.0) == "first_decode: logits differ by 0.5, more than the tolerance of 0.4"
    assert report.place("prefill") is report.places["prefill"]


def test_a_report_refuses_choices_that_differ_whatever_the_tolerance() -> None:
    spoilt = Place(max_abs=0.0, rows=4, argmax_equal=2, ties=1, first_mismatch="batch 0, step 1, row 2: token 7")
    problem = RuntimeReport({"last_position": spoilt}).problem(1.0, 1.0)
    assert problem == "last_position: 1 of 4 choices differ (first: batch 0, step 1, row 2: token 7)"


@pytest.mark.parametrize(("relative", "fails"), [(0.0, False), (1e-4, False), (1.1e-4, True), (math.nan, True)])
def test_a_report_judges_perplexity(relative: float, fails: bool) -> None:
    report = RuntimeReport(perplexity=12.0, perplexity_relative=relative)
    problem = report.problem(1e-3, 1e-4)
    assert (problem is not None and problem.startswith("perplexity: 12")) == fails
    assert report.table()["perplexity"] == 12.0
    assert "perplexity" not in RuntimeReport().table()


def test_batches_cover_everything_once() -> None:
    for count in (1, 2, 7, 8, 9):
        covered = [index for rows in batches(count, 4) for index in range(count)[rows]]
        assert covered == list(range(count))


def test_greedy_tokens_go_on_after_the_end_token() -> None:
    chosen = greedy_tokens(ClosedFormBackend(VOCABULARY), PROMPTS, 9)
    assert chosen.tolist() == [greedy(prompt, 9, VOCABULARY) for prompt in PROMPTS]


def test_one_pass_shows_the_references_choice_after_every_prefix() -> None:
    candidates = greedy_tokens(ClosedFormBackend(VOCABULARY), PROMPTS, 6)
    expected = reference_logits(reference, PROMPTS, candidates)
    assert expected.shape == (3, 6, VOCABULARY)
    for row, prompt in enumerate(PROMPTS):
        for step in range(6):
            before = [*prompt, *candidates[row, :step].tolist()]
            assert np.array_equal(expected[row, step], logits_after(before, VOCABULARY))


@pytest.mark.parametrize("wrong_step", [0, 1, 3, 5])
def test_equal_choices_in_the_pass_are_equal_greedy_continuations_and_only_then(wrong_step: int) -> None:
    """The induction: a candidate of another token at some step is found at that step, and not before."""
    candidates = greedy_tokens(ClosedFormBackend(VOCABULARY), PROMPTS, 6)
    assert np.array_equal(reference_logits(reference, PROMPTS, candidates).argmax(-1), candidates)
    candidates[1, wrong_step] = (candidates[1, wrong_step] + 1) % VOCABULARY
    agrees = reference_logits(reference, PROMPTS, candidates).argmax(-1) == candidates
    assert agrees[[0, 2]].all() and agrees[1, :wrong_step].all() and not agrees[1, wrong_step]


def compared(backend: ClosedFormBackend) -> RuntimeReport:
    candidates = greedy_tokens(ClosedFormBackend(VOCABULARY), PROMPTS, 6)
    expected = reference_logits(reference, PROMPTS, candidates)
    report = RuntimeReport()
    compare_cached(report, backend, PROMPTS, candidates, expected, 0)
    return report


def test_a_runtime_that_agrees_is_compared_at_every_place() -> None:
    report = compared(ClosedFormBackend(VOCABULARY))
    assert {name: (place.rows, place.argmax_equal, place.max_abs) for name, place in report.places.items()} == {
        "every_step": (18, 18, 0.0),
        "prefill": (3, 3, 0.0),
        "first_decode": (3, 3, 0.0),
        "last_position": (3, 3, 0.0),
        "alone": (1, 1, 0.0),
    }


@pytest.mark.parametrize(
    ("wrong_step", "name"), [(0, "prefill"), (1, "first_decode"), (3, "every_step"), (5, "last_position")]
)
def test_a_runtime_that_errs_at_one_step_is_found_at_that_place(wrong_step: int, name: str) -> None:
    def change(logits: FloatArray, step: int) -> None:
        if step == wrong_step and len(logits) == len(PROMPTS):
            logits[-1, 0] += 0.01

    report = compared(Astray(change))
    assert {name for name, each in report.places.items() if each.max_abs > 1e-3} == {name, "every_step"}
    problem = report.problem(1e-3, 1e-4)
    assert problem is not None and problem.startswith(f"{name}: ")  # The place that says most about it.
    assert report.places["every_step"].max_abs == pytest.approx(0.01, rel=1e-3)


def test_a_runtime_whose_rows_depend_on_their_company_is_found() -> None:
    def change(logits: FloatArray, step: int) -> None:
        logits += 1e-2 * (len(logits) - 3)  # Right in a batch of three, wrong alone.

    report = compared(Astray(change))
    assert {name for name, each in report.places.items() if each.max_abs > 1e-3} == {"alone"}


def test_a_runtime_that_reuses_its_buffer_is_compared_rightly() -> None:
    """Backends may give the same memory at every step; what is kept must be copied."""

    class Reusing(ClosedFormBackend):
        buffer: FloatArray | None = None

        def _logits(self, state: State) -> FloatArray:
            fresh = super()._logits(state)
            if self.buffer is None or self.buffer.shape != fresh.shape:
                self.buffer = fresh
            self.buffer[...] = fresh
            return self.buffer

    assert compared(Reusing(VOCABULARY)).problem(0.0, 0.0) is None


def test_both_ways_to_score_windows_are_the_sum_of_the_closed_form() -> None:
    windows = np.random.default_rng(1).integers(0, VOCABULARY, (3, 9))
    by_hand = 0.0
    for row in windows.tolist():
        for position in range(1, len(row)):
            logits = logits_after(row[:position], VOCABULARY).astype(np.float64)
            by_hand += math.log(np.exp(logits).sum()) - logits[row[position]]
    assert window_losses_full(reference, windows) == pytest.approx(by_hand, rel=1e-6)
    assert window_losses_cached(ClosedFormBackend(VOCABULARY), windows) == pytest.approx(by_hand, rel=1e-6)


def test_large_logits_do_not_overflow_a_loss() -> None:
    assert window_losses_full(lambda ids: 300 * reference(ids), np.array([[1, 2, 3]])) < math.inf
