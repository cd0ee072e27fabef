"""What a build prints: whole lines without a terminal, a bar with one, and nothing of a text taken for markup."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from builder.progress import Reporter

STEP = {"step": 5, "steps": 40, "loss": 2.5, "tokens_per_second": 1234.5}
VALIDATION = {
    "step": 20,
    "steps": 40,
    "validation": {
        "validation_loss": 1.5,
        "validation_perplexity": 4.4817,
        "validation_accuracy": 0.25,
        "tokens_per_second": 2000.0,
    },
}


def reporter(terminal: bool = False) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()
    return Reporter(Console(file=stream, force_terminal=terminal, width=60, highlight=False, soft_wrap=True)), stream


def test_a_line_is_one_line_as_it_is_with_the_time_in_front() -> None:
    ours, stream = reporter()
    text = "wrote /some/[bold]folder[/bold]/:smile:/" + "x" * 300
    ours.line(text)
    assert re.fullmatch(r"\[ *\d+\.\d s\] " + re.escape(text) + "\n", stream.getvalue())


def test_text_that_the_terminal_cannot_show_ends_no_build() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Reporter(Console(file=stream, highlight=False, soft_wrap=True)).line("wrote caf\u00e9/\udcff")
    stream.flush()
    assert b"wrote caf" in raw.getvalue()


def test_without_a_terminal_training_gives_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stream = reporter()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with ours.training() as notify:
        for step in range(1, 26):
            clock[0] += 1.0
            notify(STEP | {"step": step})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # 25 seconds, one line each 10.
    assert "training: step 10 of 40, loss 2.500, 1,234 tokens/s, about 30 s left" in lines[0]
    assert "step 20 of 40" in lines[1] and "about 20 s left" in lines[1]


def test_a_resumed_training_counts_its_own_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stream = reporter()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with ours.training() as notify:
        for step in range(31, 36):
            clock[0] += 2.0
            notify(STEP | {"step": step})
    assert "step 35 of 40" in stream.getvalue() and "about 10 s left" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_validation_is_always_said(terminal: bool) -> None:
    ours, stream = reporter(terminal)
    with ours.training() as notify:
        notify(STEP)
        notify(VALIDATION)
    assert "validation at step 20 of 40: loss 1.500, perplexity 4.48, token accuracy 25.0%" in stream.getvalue()


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    ours, stream = reporter(terminal=True)
    with ours.training() as notify:
        notify(STEP)
    text = stream.getvalue()
    assert "step 5/40" in text and "loss 2.500" in text
    assert text.endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in text
