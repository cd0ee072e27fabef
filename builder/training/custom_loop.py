"""The project's own training loop: what `Model.fit` does, in the open, on the same model, optimizer and callbacks."""

from __future__ import annotations

from typing import Any

from builder.keras_backend import keras, tf
from builder.training.callbacks import Watch


def run_epochs(
    model: Any, train: Any, validation: Any, *, first: int, epochs: int, calls: int, watch: Watch, xla: bool
) -> None:
    """Take epochs `first` to `epochs` - 1 of `calls` calls of the optimizer each, validating after each.

    Args:
        model: a `builder.training.trainer.LanguageModel`, compiled with its optimizer.
        train: a dataset of (inputs, targets), int32 [batch, sequence] each, and weights where there are any, of all
            calls that are left.
        validation: a dataset of (inputs, targets, weights).
        xla: compile both steps with XLA.

    Gives the same weights as `Model.fit` but for rounding, since a compiler may order sums otherwise.
    """
    callbacks = keras.callbacks.CallbackList([watch], model=model)

    gradients = tf.function(model.gradients, jit_compile=xla)

    # The sum over workers leaves the graph, which XLA cannot.
    @tf.function(jit_compile=xla and model.workers is None)  # type: ignore[untyped-decorator]
    def train_step(inputs: Any, targets: Any, weights: Any = None) -> None:
        model.optimizer.apply(gradients(inputs, targets, weights), model.trainable_variables)

    def figures() -> dict[str, float]:
        return {name: float(value) for name, value in model.get_metrics_result().items()}

    @tf.function(jit_compile=xla)  # type: ignore[untyped-decorator]
    def test_step(inputs: Any, targets: Any, weights: Any) -> None:
        model.compute_loss(inputs, targets, model(inputs, training=False), weights, training=False)

    batches = iter(train)
    model.stop_training = False
    for epoch in range(first, epochs):
        callbacks.on_epoch_begin(epoch)
        model.perplexity.reset_state()
        for call in range(calls):
            train_step(*next(batches))
            logs = figures()
            callbacks.on_train_batch_end(call, logs)
        callbacks.on_test_begin()
        model.perplexity.reset_state()
        model.accuracy.reset_state()
        for batch in validation:
            test_step(*batch)
        logs |= {f"val_{name}": value for name, value in figures().items()}
        callbacks.on_test_end(logs)
        callbacks.on_epoch_end(epoch, logs)
        if model.stop_training:
            return
