"""Training's figures as files: one line of JSON a step interval, and TensorBoard's event files on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends figures to `folder`/metrics.jsonl, and to `folder`/tensorboard if asked.

    A line is {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second"} (nats a token, mean over the
    interval; the norm before clipping of the last call of the optimizer) or {"step", "validation_loss"}.

    Args:
        folder: the training stage's folder.
        every: steps between two lines; validations are always written.
        tensorboard: write TensorBoard scalars too.
        tell: gets a list of lines too: those of earlier starts of a resumed run, then each new one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        tensorboard: bool = False,
        tell: Callable[[list[dict[str, float]]], None] | None = None,
    ) -> None:
        self.folder, self.every, self.tensorboard, self.tell = folder, every, tensorboard, tell
        self._writer: Any = None

    def open_at(self, step: int) -> None:
        """Keep what was written up to `step`, which a resumed run does not repeat, and drop the rest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self.folder) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        (self.folder / METRICS).write_text(text, encoding="utf-8")
        if not step:
            shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
        if self.tell is not None and kept:
            self.tell(kept)

    def write(self, record: dict[str, float]) -> None:
        """Append one line; `record` has "step" and figures."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.tell is not None:
            self.tell([record])
        if not self.tensorboard:
            return
        from builder.keras_backend import tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.folder / TENSORBOARD))
        # `tf.summary.scalar` wants the tensorboard package, which only a reader of the files needs.
        metadata = tf.compat.v1.SummaryMetadata(
            plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class="DATA_CLASS_SCALAR"
        )
        with self._writer.as_default(step=int(record["step"])):
            for name, value in record.items():
                if name != "step":
                    tf.summary.write(name, tf.constant(value, tf.float32), metadata=metadata)
        self._writer.flush()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `folder`/metrics.jsonl; none where there is no file, and without one that a kill cut off."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
