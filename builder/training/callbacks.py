"""What happens around the steps, whichever loop takes them: figures, checkpoints, and the reasons to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from builder.keras_backend import keras
from builder.recipe import TrainingRecipe
from builder.training.checkpoints import Progress, save_best, save_checkpoint
from builder.training.metrics_log import MetricsLog
from builder.training.optimizers import averaged
from serving.errors import TrainingError

Notify = Callable[[dict[str, Any]], None]
_ROWS_NAMED = 8


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Report progress, keep the history, write a checkpoint at each validation, stop on a loss that is not a number.

    Args:
        folder: where checkpoints go; None writes none.
        steps: updates of the weights in the whole run.
        interval: updates between two validations.
        start: how far the run has come.
        notify: gets a dictionary after every step, and one with the key "validation" after every validation.
        log: where figures are written.
        sample: makes (prompt, continuation) pairs of the model as it is, for the event and the row of a validation.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        folder: Path | None,
        run_id: str,
        steps: int,
        interval: int,
        start: Progress,
        notify: Notify,
        log: MetricsLog | None = None,
        sample: Callable[[], list[tuple[str, str]]] | None = None,
    ) -> None:
        super().__init__()
        self.log, self.sample = log, sample
        self.logged_loss, self.logged_count, self.logged_step = 0.0, 0.0, start.step
        self.logged_at = time.monotonic()
        if log is not None:
            log.open_at(start.step)
        self.recipe, self.folder, self.run_id, self.steps, self.notify = recipe, folder, run_id, steps, notify
        self.interval = interval
        self.step, self.history = start.step, list(start.history)
        self.calls = start.step * recipe.accumulation
        self.interval_start, self.interval_step = time.monotonic(), start.step
        self.rows_of: Callable[[int], NDArray[Any]] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether training should stop early, by `patience`."""
        return 0 < self.recipe.patience <= Progress(self.step, self.history).stale

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.interval_start, self.interval_step = time.monotonic(), self.step
        self.logged_loss, self.logged_count, self.logged_step = 0.0, 0.0, self.step
        self.logged_at = self.interval_start

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.calls += 1
        loss = math.log(max(float(logs["perplexity"]), 1e-30))
        if not math.isfinite(loss):
            self.step = -(-self.calls // self.recipe.accumulation)
            self._stop("the loss", self._rows())
        if self.calls % self.recipe.accumulation:
            return
        self.step += 1
        self.notify({"step": self.step, "steps": self.steps, "loss": loss, "tokens_per_second": self._speed()})
        # At the end of an interval too, so that even a run of one step has a line.
        if self.log is not None and (self.step % self.log.every == 0 or self.step % self.interval == 0):
            self._log(self.log, loss, float(logs.get("tokens", self.model.perplexity.count)))

    def _log(self, log: MetricsLog, mean: float, count: float) -> None:
        """Write the figures since the last line; `mean` is the loss of `count` targets since the last validation."""
        now = time.monotonic()
        new = count - self.logged_count
        tokens = (self.step - self.logged_step) * self.recipe.batch_size * self.recipe.sequence_length
        log.write(
            {
                "step": self.step,
                "loss": (mean * count - self.logged_loss) / new if new else mean,
                "learning_rate": float(self.model.optimizer.learning_rate),
                "gradient_norm": float(self.model.optimizer.gradient_norm),
                "tokens_per_second": tokens / max(now - self.logged_at, 1e-9),
            }
        )
        self.logged_loss, self.logged_count, self.logged_step, self.logged_at = mean * count, count, self.step, now

    def on_test_begin(self, logs: Any = None) -> None:
        self.measured_speed = self._speed()
        self.swap = contextlib.ExitStack()
        self.swap.enter_context(averaged(self.model, self.model.optimizer))

    def on_test_end(self, logs: Any = None) -> None:
        self.samples = self.sample() if self.sample is not None else []
        self.swap.close()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        row = {
            "step": self.step,
            "train_loss": math.log(float(logs["perplexity"])),
            "validation_loss": math.log(float(logs["val_perplexity"])),
            "validation_perplexity": float(logs["val_perplexity"]),
            "validation_accuracy": float(logs["val_accuracy"]),
            "learning_rate": float(self.model.optimizer.learning_rate),
            "tokens_per_second": self.measured_speed,
        }
        if not math.isfinite(row["validation_loss"]):
            self._stop("the validation loss", "")
        self.history.append(row)
        if self.folder is not None:
            self._save(self.folder, Progress(self.step, self.history))
        if self.log is not None:
            self.log.write({"step": self.step, "validation_loss": row["validation_loss"]})
        event = {"step": self.step, "steps": self.steps, "validation": row}
        self.notify(event | {"samples": self.samples, "history": self.history})
        if self.is_stale:
            self.model.stop_training = True

    def _save(self, folder: Path, progress: Progress) -> None:
        if self.recipe.keep == "best" and progress.stale == 0:
            # Before the checkpoint that speaks of it: a kill between the two only means that both are made again.
            with averaged(self.model, self.model.optimizer):
                save_best(folder, self.model, self.run_id, self.step)
        save_checkpoint(folder, self.model, self.model.optimizer, self.run_id, progress, self.recipe.checkpoints_kept)

    def _stop(self, what: str, where: str) -> None:
        kept = f" (the checkpoint of step {self.history[-1]['step']} is kept)" if self.history else ""
        raise TrainingError(
            f"{what} is not a number at step {self.step} of {self.steps}{where}; lower training.learning_rate or "
            f"training.max_grad_norm{kept}"
        )

    def _rows(self) -> str:
        if self.rows_of is None:
            return ""
        rows = self.rows_of(self.step - 1).tolist()
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        places = ", ".join(str(row) for row in rows[:_ROWS_NAMED])
        return f", on the rows that begin at tokens {places}{more} of the training stream"

    def _speed(self) -> float:
        seconds = time.monotonic() - self.interval_start
        tokens = (self.step - self.interval_step) * self.recipe.batch_size * self.recipe.sequence_length
        return tokens / seconds if seconds > 0 else 0.0
