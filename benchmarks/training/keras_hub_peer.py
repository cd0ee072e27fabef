"""The KerasHub trainer: GPT2CausalLM.fit on TensorFlow with Keras's AdamW, with or without XLA.

Runs in the peers' environment: `python -m benchmarks.training.keras_hub_peer JOB.json [xla]`. It has no accuracy
metric, which its default would compute in every step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from benchmarks.training.job import TrainingJob, batches, finish


class StepTimes(keras.callbacks.Callback):  # type: ignore[misc]
    """Seconds of each step of a fit; the first holds the trace and the compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now


def dataset(job: TrainingJob) -> Any:
    """What `GPT2CausalLM.fit` reads without a preprocessor: token ids with their mask, and the targets."""

    def generate() -> Iterator[tuple[dict[str, Any], Any]]:
        for rows in batches(job):
            yield {"token_ids": rows[:, :-1], "padding_mask": np.ones(rows[:, :-1].shape, bool)}, rows[:, 1:]

    shape = (job.batch_size, job.sequence_length)
    ids = tf.TensorSpec(shape, tf.int32)
    inputs = {"token_ids": ids, "padding_mask": tf.TensorSpec(shape, tf.bool)}
    made = tf.data.Dataset.from_generator(generate, output_signature=(inputs, ids))
    return made.apply(tf.data.experimental.assert_cardinality(job.steps)).prefetch(2)


def train(job: TrainingJob, xla: bool) -> None:
    """Take the job's steps, timing each, and print the result."""
    keras.utils.set_random_seed(job.seed)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=job.vocab_size,
        num_layers=job.n_layer,
        num_heads=job.n_head,
        hidden_dim=job.n_embd,
        intermediate_dim=4 * job.n_embd,
        dropout=0.0,
        max_sequence_length=job.n_positions,
    )
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=job.steps - job.warmup,
        alpha=job.final,
        warmup_target=job.learning_rate,
        warmup_steps=job.warmup,
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=job.weight_decay,
        beta_1=job.beta1,
        beta_2=job.beta2,
        epsilon=job.epsilon,
        global_clipnorm=job.max_grad_norm,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "embeddings"])
    model.compile(optimizer=optimizer, weighted_metrics=[], jit_compile=xla)
    times = StepTimes()
    model.fit(dataset(job), epochs=1, shuffle=False, verbose=0, callbacks=[times])
    versions = {"keras_hub": keras_hub.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    finish(times.seconds, None, versions)


if __name__ == "__main__":
    train(TrainingJob.read(Path(sys.argv[1])), "xla" in sys.argv[2:])
