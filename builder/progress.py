"""What a person sees while a build works: stages, lines, and a bar for training; plain lines without a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from serving.support.interrupts import check_interrupt

# Seconds between two lines about training when there is no terminal to draw a bar on.
_LINE_INTERVAL = 10.0


class Reporter:
    """Prints to standard output; every line stands alone, so a log of it can be read."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.started = time.monotonic()

    def line(self, text: str) -> None:
        """Print one line, with the seconds since the start. Raises KeyboardInterrupt if Ctrl-C was lost before."""
        check_interrupt()
        # A path may hold what the terminal's encoding has no form for; that must not end a build.
        text = text.encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.print(f"[{time.monotonic() - self.started:6.1f} s] {text}", markup=False, emoji=False)

    @contextlib.contextmanager
    def training(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Give the function that `builder.training.trainer.fit` notifies, showing a bar or now and then a line."""
        if not self.console.is_terminal:
            yield self._line_notifier()
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("training", total=None, detail="")

            def notify(event: dict[str, Any]) -> None:
                check_interrupt()
                if "validation" in event:
                    self.line(_validation(event))
                    return
                detail = f"step {event['step']:,}/{event['steps']:,}  loss {event['loss']:.3f}"
                detail += f"  {event['tokens_per_second']:,.0f} tokens/s"
                bar.update(task, total=event["steps"], completed=event["step"], detail=detail)

            yield notify

    def _line_notifier(self) -> Callable[[dict[str, Any]], None]:
        last, last_step = time.monotonic(), -1

        def notify(event: dict[str, Any]) -> None:
            nonlocal last, last_step
            check_interrupt()
            if "validation" in event:
                self.line(_validation(event))
                return
            if last_step < 0:
                last_step = event["step"] - 1  # A resumed run does not start at 0.
            seconds = time.monotonic() - last
            if seconds >= _LINE_INTERVAL:
                left = (event["steps"] - event["step"]) * seconds / (event["step"] - last_step)
                last, last_step = time.monotonic(), event["step"]
                self.line(
                    f"training: step {event['step']:,} of {event['steps']:,}, loss {event['loss']:.3f}, "
                    f"{event['tokens_per_second']:,.0f} tokens/s, about {left:.0f} s left"
                )

        return notify


def _validation(event: dict[str, Any]) -> str:
    row = event["validation"]
    return (
        f"validation at step {event['step']:,} of {event['steps']:,}: loss {row['validation_loss']:.3f}, "
        f"perplexity {row['validation_perplexity']:.2f}, token accuracy {row['validation_accuracy']:.1%}, "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )
