"""Fit GPT-2 on token shards, by Keras's `fit` or by the project's own loop, resumable at every validation."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.document_batches import make_sampler, training_batches, validation_batches
from builder.data.masked_shards import Shard
from builder.data.packed_batches import WHOLE, Share
from builder.keras_backend import keras, tf
from builder.model.gpt2 import GPT2, random_states
from builder.recipe import TrainingRecipe
from builder.training.callbacks import Notify, Watch
from builder.training.checkpoints import Progress, load_best, load_checkpoint, training_state
from builder.training.custom_loop import run_epochs
from builder.training.glibc_heap import kept_heap
from builder.training.metrics_log import MetricsLog
from builder.training.optimizers import make_optimizer, summed
from builder.training.plan import plan_steps
from builder.training.workers import Workers
from serving.errors import TrainingError


class Perplexity(keras.metrics.Mean):  # type: ignore[misc]
    """exp of the mean negative log-likelihood a token, in nats, weighted by token."""

    def result(self) -> Any:
        return keras.ops.exp(super().result())


class LanguageModel(GPT2):
    """GPT-2 with the language-model loss, its perplexity and the accuracy, exact means over the weighted tokens."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.perplexity = Perplexity(name="perplexity")
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        self.label_smoothing = 0.0
        self.workers: Workers | None = None
        self._compiled_gradients: Any = None

    def compile(self, *, optimizer: Any = None, jit_compile: Any = "auto", **options: Any) -> None:
        """Set the optimizer. Raises TypeError for a loss or metrics, since this model computes its own."""
        if options:
            raise TypeError(
                f"LanguageModel has a loss and metrics of its own, so it takes no {', '.join(options)}; "
                "compile a builder.model.gpt2.GPT2 for others"
            )
        self._compiled_gradients = tf.function(self.gradients, jit_compile=jit_compile is True)
        # The sum over workers leaves the graph, which XLA cannot.
        super().compile(optimizer=optimizer, jit_compile=jit_compile if self.workers is None else False)

    def gradients(self, inputs: Any, targets: Any, weights: Any = None) -> list[Any]:
        """The gradient of each trainable variable on this process's rows, as dense tensors."""
        with tf.GradientTape() as tape:
            loss = self.compute_loss(inputs, targets, self(inputs, training=True), weights, training=True)
        found = tape.gradient(loss, [variable.value for variable in self.trainable_variables])
        return [tf.convert_to_tensor(gradient) for gradient in found]

    def train_step(self, data: Any) -> Any:
        """One call of the optimizer: Keras's own, or with several workers one on the sum of their gradients."""
        if self.workers is None:
            return super().train_step(data)
        gradients = self._compiled_gradients(*keras.utils.unpack_x_y_sample_weight(data))
        figures = self.get_metrics_result()
        with tf.control_dependencies([figures["perplexity"]]):
            self.optimizer.apply(gradients, self.trainable_variables)
        return figures

    def get_metrics_result(self) -> dict[str, Any]:
        """The figures by name; with several workers, of all their rows, and the number of "tokens" in them."""
        if self.workers is None:
            return super().get_metrics_result()  # type: ignore[no-any-return]
        sums = [self.perplexity.total, self.perplexity.count, self.accuracy.total, self.accuracy.count]
        losses, tokens, correct, judged = summed([tf.convert_to_tensor(sum) for sum in sums], self.workers)
        return {
            "perplexity": tf.exp(tf.math.divide_no_nan(losses, tokens)),
            "accuracy": tf.math.divide_no_nan(correct, judged),
            "tokens": tokens,
        }

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Mean cross-entropy (nats a token) of logits `y_pred` [batch, sequence, vocab] against ids `y`.

        In training, `label_smoothing` e makes the target 1 - e of the token and e spread evenly over the vocabulary
        (Szegedy et al. 2016, section 7); the perplexity never is of the smoothed targets. The accuracy is
        counted outside training only, since the largest logit of each token takes a pass over all of them.

        In validation it is the mean by `sample_weight`, 0 where no weight is above 0. In training it is the sum by the
        weights, which carry what to divide by (see `document_batches.training_batches`). The perplexity counts each
        target of a weight above 0 once in both.
        """
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, y_pred)
        counted = None if sample_weight is None else tf.cast(sample_weight > 0, losses.dtype)
        self.perplexity.update_state(losses, counted)
        if not training:
            self.accuracy.update_state(y, y_pred, counted)
        elif self.label_smoothing:
            even = tf.reduce_logsumexp(y_pred, -1) - tf.reduce_mean(y_pred, -1)
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * even
        if sample_weight is None:
            processes = 1 if self.workers is None else self.workers.size
            return tf.reduce_mean(losses) / (tf.distribute.get_strategy().num_replicas_in_sync * processes)
        total = tf.reduce_sum(losses * sample_weight)
        return total if training else tf.math.divide_no_nan(total, _over_all_devices(tf.reduce_sum(sample_weight)))


def _over_all_devices(value: Any) -> Any:
    """The sum of each device's `value`; gradients are summed over the devices too, so parts of a mean add up to it."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


@contextlib.contextmanager
def layer_precision(precision: str) -> Iterator[None]:
    """Make layers that are created inside compute in "float32" or "bfloat16"; their weights are float32 in both."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def fit(
    model: LanguageModel,
    recipe: TrainingRecipe,
    train: Shard | NDArray[Any],
    validation: Shard | NDArray[Any],
    *,
    seed: int,
    folder: Path,
    run_id: str,
    notify: Notify,
    log: MetricsLog | None = None,
    sample: Callable[[], list[tuple[str, str]]] | None = None,
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place and return one row a validation (step, losses, perplexity, accuracy, tokens/s).

    Resumes the checkpoint in `folder` if it is of the same `run_id`. `notify` gets a dictionary after every step,
    and one with the keys "validation", "samples" (what `sample` gives) and "history" after every validation;
    figures go to `log`. Raises TrainingError when the loss is not a number.

    Each of several `workers` trains on its rows of every batch, and all get the same history. The chief alone resumes,
    gives its state to the others and writes; in the others `model` ends with the last weights, not the best ones.
    Raises TrainingError when another worker has failed.
    """
    train, validation = Shard.of(train), Shard.of(validation)
    sampler = make_sampler(train, recipe, seed) if recipe.epochs else None
    steps, interval = plan_steps(recipe, sampler.rows if sampler else 0)
    if steps == 0:
        if log is not None:
            log.open_at(0)
        row = {"step": 0, **evaluate(model, validation, recipe)}
        notify({"step": 0, "steps": 0, "validation": row, "history": [row]})
        return [row]
    model.label_smoothing = recipe.label_smoothing
    optimizer = make_optimizer(recipe, steps)
    optimizer.build(model.trainable_variables)
    model.workers = optimizer.workers = workers
    writes = workers is None or workers.is_chief
    best = recipe.keep == "best" and writes
    start = (load_checkpoint(folder, model, optimizer, run_id, with_best=best) if writes else None) or Progress(0, [])
    if workers is not None:
        start = _chiefs_state(workers, model, optimizer, start)
    watch = Watch(recipe, folder if writes else None, run_id, steps, interval, start, notify, log, sample)
    if sampler and start.step < steps and not watch.is_stale:
        watch.rows_of = sampler.starts
        with kept_heap(), _failures_of(workers):
            _run(model, optimizer, recipe, train, validation, seed, steps, interval, watch)
    model.workers = None
    optimizer.finalize_variable_values(model.trainable_variables)
    if best and not load_best(folder, model, run_id, exported_row(watch.history, recipe)["step"]):
        raise TrainingError(f"{folder}: the best weights are gone; run the same command again")
    return watch.history


@contextlib.contextmanager
def _failures_of(workers: Workers | None) -> Iterator[None]:
    """Raise TrainingError for what TensorFlow wraps when a sum over workers fails."""
    try:
        yield
    except Exception:
        if workers is not None and workers.failure:
            raise TrainingError(workers.failure) from None
        raise


def _chiefs_state(workers: Workers, model: LanguageModel, optimizer: Any, start: Progress) -> Progress:
    """Give every worker the chief's weights, optimizer and progress; only the seeds of dropout differ, by the rank."""
    for variable in training_state(model, optimizer).values():
        variable.assign(workers.from_chief(np.asarray(variable)))
    text = np.frombuffer(json.dumps([start.step, start.history]).encode(), np.uint8)
    size = int(workers.from_chief(np.array([len(text)]))[0])
    step, history = json.loads(bytes(workers.from_chief(text if workers.is_chief else np.zeros(size, np.uint8))))
    for state in random_states(model):
        state.assign(np.asarray(state) + np.array([workers.rank, 0], np.asarray(state).dtype))
    return Progress(step, history)


def exported_row(history: list[dict[str, Any]], recipe: TrainingRecipe) -> dict[str, Any]:
    """The history's row of the weights that `fit` left in the model."""
    return history[Progress(0, history).best if recipe.keep == "best" else -1]


def _run(
    model: LanguageModel,
    optimizer: Any,
    recipe: TrainingRecipe,
    train: Shard,
    validation: Shard,
    seed: int,
    steps: int,
    interval: int,
    watch: Watch,
) -> None:
    """Take the steps that are left, calling the optimizer `recipe.accumulation` times in each."""
    # On several devices Keras joins them in the middle of a step, where XLA cannot.
    one_device = model.distribute_strategy.num_replicas_in_sync == 1
    model.compile(optimizer=optimizer, jit_compile=recipe.jit_compile and one_device)
    parts = recipe.accumulation
    share = WHOLE if model.workers is None else Share(model.workers.rank, model.workers.size)
    dataset = training_batches(train, recipe, seed=seed, steps=steps, start_step=watch.step, share=share)
    held_out = validation_batches(validation, recipe, share)
    first, epochs, calls = watch.step // interval, steps // interval, interval * parts
    if recipe.loop == "custom":
        run_epochs(
            model, dataset, held_out, first=first, epochs=epochs, calls=calls, watch=watch, xla=recipe.jit_compile
        )
        return
    model.fit(
        dataset,
        validation_data=held_out,
        initial_epoch=first,
        epochs=epochs,
        steps_per_epoch=calls,
        callbacks=[watch],
        shuffle=False,
        verbose=0,
    )


def evaluate(model: LanguageModel, validation: Shard | NDArray[Any], recipe: TrainingRecipe) -> dict[str, float | None]:
    """A history row for weights as they are: nats, perplexity and accuracy a token over the counted targets."""
    model.compile(jit_compile=False)
    logs = model.evaluate(validation_batches(Shard.of(validation), recipe), return_dict=True, verbose=0)
    perplexity = float(logs["perplexity"])
    return {
        "train_loss": None,
        "validation_loss": math.log(perplexity),
        "validation_perplexity": perplexity,
        "validation_accuracy": float(logs["accuracy"]),
        "learning_rate": 0.0,
        "tokens_per_second": 0.0,
    }
