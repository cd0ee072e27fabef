"""Fit GPT-2 on token shards with Keras `compile` and `fit`, resumable at every validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from builder.checkpoint import Progress, load_checkpoint, save_checkpoint
from builder.frameworks import keras, tf
from builder.gpt2 import GPT2
from builder.recipe import TrainingRecipe
from builder.tokens import training_dataset, training_steps, validation_dataset
from serving.errors import TrainingError

Notify = Callable[[dict[str, Any]], None]


class Perplexity(keras.metrics.Mean):  # type: ignore[misc]
    """exp of the mean negative log-likelihood a token, in nats, weighted by token."""

    def result(self) -> Any:
        return keras.ops.exp(super().result())


class LanguageModel(GPT2):
    """GPT-2 with the language-model loss and its perplexity, both exact means over the weighted tokens."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.perplexity = Perplexity(name="perplexity")

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Mean cross-entropy (nats a token) of logits `y_pred` [batch, sequence, vocab] against ids `y`."""
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, y_pred)
        self.perplexity.update_state(losses, sample_weight)
        if sample_weight is None:
            return tf.reduce_mean(losses)
        return tf.reduce_sum(losses * sample_weight) / tf.reduce_sum(sample_weight)


def plan_steps(recipe: TrainingRecipe, tokens: int) -> tuple[int, int]:
    """Return (steps in all, steps between validations); the first is rounded up to a multiple of the second.

    No epochs are no steps.
    """
    if recipe.epochs == 0:
        return 0, 1
    steps = training_steps(
        tokens, sequence_length=recipe.sequence_length, batch_size=recipe.batch_size, epochs=recipe.epochs
    )
    interval = math.ceil(steps / recipe.validations)
    return interval * math.ceil(steps / interval), interval


def make_optimizer(recipe: TrainingRecipe, steps: int) -> Any:
    """Muon or AdamW with linear warm-up and cosine decay; biases, norms and embeddings are not decayed.

    Muon (Jordan et al., 2024) orthogonalises the momentum of each block's matrices; scaled as by Liu et al. (2025,
    arXiv:2502.16982), one rate means updates of AdamW's size. AdamW fits what is no matrix, and the embeddings.
    """
    warmup = min(steps - 1, round(steps * recipe.warmup_fraction))
    rate: Any = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else recipe.learning_rate,
        decay_steps=max(1, steps - warmup),
        alpha=recipe.final_learning_rate_fraction,
        warmup_target=recipe.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    shared = {"weight_decay": recipe.weight_decay, "global_clipnorm": recipe.max_grad_norm}
    if recipe.optimizer == "muon":
        optimizer = keras.optimizers.Muon(
            rate,
            adam_lr_ratio=recipe.adam_rate_ratio,
            adam_beta_1=recipe.adam_beta1,
            adam_beta_2=recipe.adam_beta2,
            adam_weight_decay=None,
            **shared,
        )
    else:
        optimizer = keras.optimizers.AdamW(rate, beta_1=recipe.adam_beta1, beta_2=recipe.adam_beta2, **shared)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "embeddings"])
    return optimizer


class _Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Report progress, keep the history, write a checkpoint at each validation, stop on a loss that is no number."""

    def __init__(
        self, recipe: TrainingRecipe, folder: Path, run_id: str, steps: int, start: Progress, notify: Notify
    ) -> None:
        super().__init__()
        self.recipe, self.folder, self.run_id, self.steps, self.notify = recipe, folder, run_id, steps, notify
        self.step, self.history = start.step, list(start.history)
        self.interval_start, self.interval_step = time.monotonic(), start.step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.interval_start, self.interval_step = time.monotonic(), self.step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.step += 1
        loss = math.log(max(float(logs["perplexity"]), 1e-30))
        self._stop_unless_finite(loss)
        self.notify({"step": self.step, "steps": self.steps, "loss": loss, "tokens_per_second": self._speed()})

    def on_test_begin(self, logs: Any = None) -> None:
        self.measured_speed = self._speed()

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
        self._stop_unless_finite(row["validation_loss"])
        self.history.append(row)
        save_checkpoint(self.folder, self.model, self.model.optimizer, self.run_id, Progress(self.step, self.history))
        self.notify({"step": self.step, "steps": self.steps, "validation": row})

    def _stop_unless_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = f" (the checkpoint of step {self.history[-1]['step']} is kept)" if self.history else ""
            raise TrainingError(
                f"the loss is not a number at step {self.step} of {self.steps}; lower training.learning_rate or "
                f"training.max_grad_norm{kept}"
            )

    def _speed(self) -> float:
        seconds = time.monotonic() - self.interval_start
        tokens = (self.step - self.interval_step) * self.recipe.batch_size * self.recipe.sequence_length
        return tokens / seconds if seconds > 0 else 0.0


def fit(
    model: LanguageModel,
    recipe: TrainingRecipe,
    train: NDArray[Any],
    validation: NDArray[Any],
    *,
    seed: int,
    folder: Path,
    run_id: str,
    notify: Notify,
) -> list[dict[str, Any]]:
    """Train `model` in place and return one row a validation (step, losses, perplexity, accuracy, tokens/s).

    Takes up the checkpoint in `folder` if it is of the same `run_id`. `notify` gets a dictionary after every step,
    and one with the key "validation" after every validation. Raises TrainingError when the loss is not a number.
    """
    steps, interval = plan_steps(recipe, len(train))
    if steps == 0:
        row = {"step": 0, **evaluate(model, validation, recipe.sequence_length, recipe.batch_size)}
        notify({"step": 0, "steps": 0, "validation": row})
        return [row]
    optimizer = make_optimizer(recipe, steps)
    optimizer.build(model.trainable_variables)
    start = load_checkpoint(folder, model, optimizer, run_id) or Progress(0, [])
    if start.step >= steps:
        return start.history
    model.compile(
        optimizer=optimizer,
        metrics=[],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=recipe.jit_compile,
    )
    watch = _Watch(recipe, folder, run_id, steps, start, notify)
    rows = {"sequence_length": recipe.sequence_length, "batch_size": recipe.batch_size}
    model.fit(
        training_dataset(train, **rows, seed=seed, steps=steps, start_step=start.step),
        validation_data=validation_dataset(validation, **rows),
        initial_epoch=start.step // interval,
        epochs=steps // interval,
        steps_per_epoch=interval,
        callbacks=[watch],
        shuffle=False,
        verbose=0,
    )
    return watch.history


def evaluate(
    model: LanguageModel, tokens: NDArray[Any], sequence_length: int, batch_size: int
) -> dict[str, float | None]:
    """A history row for weights as they are: nats, perplexity and accuracy a token over `tokens` but the first."""
    model.compile(weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")], jit_compile=False)
    dataset = validation_dataset(tokens, sequence_length=sequence_length, batch_size=batch_size)
    logs = model.evaluate(dataset, return_dict=True, verbose=0)
    perplexity = float(logs["perplexity"])
    return {
        "train_loss": None,
        "validation_loss": math.log(perplexity),
        "validation_perplexity": perplexity,
        "validation_accuracy": float(logs["accuracy"]),
        "learning_rate": 0.0,
        "tokens_per_second": 0.0,
    }
