"""Optimizers and learning-rate schedules, as a recipe describes them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from builder.keras_backend import keras, ops, tf
from builder.recipe import TrainingRecipe
from builder.training.plan import warmup_steps
from builder.training.workers import Workers


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A linear rise from 0 to `peak` over `warmup` steps, then what `kind` says until step `steps`.

    With s the step: "constant" stays at `peak`; "linear" falls to `peak * final` in a straight line that ends at
    `steps`; "inverse_sqrt" is `peak * sqrt(max(warmup, 1) / s)` (Vaswani et al. 2017, section 5.3).
    """

    def __init__(self, kind: str, peak: float, *, warmup: int, steps: int, final: float = 0.0) -> None:
        self.kind, self.peak, self.warmup, self.steps, self.final = kind, peak, warmup, steps, final

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        if self.kind == "linear":
            share = ops.clip((step - self.warmup) / max(1, self.steps - self.warmup), 0.0, 1.0)
            factor = 1.0 - (1.0 - self.final) * share
        elif self.kind == "inverse_sqrt":
            start = float(max(self.warmup, 1))
            factor = ops.sqrt(start / ops.maximum(step, start))
        else:
            factor = ops.ones_like(step)
        if self.warmup:
            factor = ops.where(step < self.warmup, step / self.warmup, factor)
        return self.peak * factor

    def get_config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "peak": self.peak,
            "warmup": self.warmup,
            "steps": self.steps,
            "final": self.final,
        }


class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """`schedule` for an optimizer that counts `parts` calls of each update: Keras asks with the number of calls."""

    def __init__(self, schedule: Any, parts: int) -> None:
        self.schedule, self.parts = schedule, parts

    def __call__(self, step: Any) -> Any:
        return self.schedule(ops.floor_divide(step, self.parts))

    def get_config(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "parts": self.parts}


def summed(tensors: list[Any], workers: Workers) -> list[Any]:
    """Each tensor summed over all workers, by one all-reduce on the host. The tensors have one type and known shapes.

    The operation has no order among others of a graph: two of them there need a control dependency.
    """
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    total = tf.ensure_shape(tf.numpy_function(workers.all_reduce, [flat], flat.dtype), [sum(sizes)])
    parts = tf.split(total, sizes)
    return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _Measured:
    """Keeps the global norm of the gradients that were applied last, before clipping, in `gradient_norm`.

    On several devices or workers it sums their gradients before all else. Keras would sum those of devices after the
    clipping, which would then clip the parts of a batch and not the batch.
    """

    gradient_norm: Any
    workers: Workers | None = None

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads = [tf.convert_to_tensor(grad) for grad in grads]
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        if self.workers is not None:
            grads = summed(grads, self.workers)
        self.gradient_norm.assign(tf.linalg.global_norm(grads))
        super().apply(grads, trainable_variables)  # type: ignore[misc]

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars


class MeasuredMuon(_Measured, keras.optimizers.Muon):  # type: ignore[misc]
    """Muon that keeps its gradients' norm."""


class MeasuredAdamW(_Measured, keras.optimizers.AdamW):  # type: ignore[misc]
    """AdamW that keeps its gradients' norm."""


class MeasuredAdam(_Measured, keras.optimizers.Adam):  # type: ignore[misc]
    """Adam that keeps its gradients' norm."""


class MeasuredSGD(_Measured, keras.optimizers.SGD):  # type: ignore[misc]
    """Stochastic gradient descent that keeps its gradients' norm."""


def make_schedule(recipe: TrainingRecipe, steps: int) -> Any:
    """The learning rate as a function of the update's number, 0 to `steps` - 1; see `recipe.schedule`."""
    warmup = warmup_steps(recipe, steps)
    if recipe.schedule != "cosine":
        return WarmUp(
            recipe.schedule,
            recipe.learning_rate,
            warmup=warmup,
            steps=steps,
            final=recipe.final_learning_rate_fraction,
        )
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else recipe.learning_rate,
        decay_steps=max(1, steps - warmup),
        alpha=recipe.final_learning_rate_fraction,
        warmup_target=recipe.learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def make_optimizer(recipe: TrainingRecipe, steps: int) -> Any:
    """The recipe's optimizer with its schedule; biases, norms and embeddings are not decayed.

    Muon (Jordan et al., 2024) orthogonalises the momentum of each block's matrices; scaled as by Liu et al. (2025,
    arXiv:2502.16982), one rate means updates of AdamW's size. AdamW fits the embeddings and everything that is
    not a matrix.

    With `recipe.accumulation` of k, the optimizer is called k times an update. Keras moves the average of the weights
    (`recipe.ema`) at every call, so its momentum is the k-th root of the recipe's.
    """
    parts = recipe.accumulation
    rate = make_schedule(recipe, steps)
    shared: dict[str, Any] = {"global_clipnorm": recipe.max_grad_norm}
    if parts > 1:
        rate = PerUpdate(rate, parts)
        shared["gradient_accumulation_steps"] = parts
    if recipe.ema > 0:
        shared |= {"use_ema": True, "ema_momentum": recipe.ema ** (1 / parts)}
    if recipe.optimizer == "sgd":
        optimizer = MeasuredSGD(rate, momentum=recipe.momentum, **shared)
    elif recipe.optimizer == "adam":
        optimizer = MeasuredAdam(rate, beta_1=recipe.adam_beta1, beta_2=recipe.adam_beta2, **shared)
    elif recipe.optimizer == "muon":
        optimizer = MeasuredMuon(
            rate,
            adam_lr_ratio=recipe.adam_rate_ratio,
            adam_beta_1=recipe.adam_beta1,
            adam_beta_2=recipe.adam_beta2,
            adam_weight_decay=None,
            weight_decay=recipe.weight_decay,
            **shared,
        )
    else:
        optimizer = MeasuredAdamW(
            rate, weight_decay=recipe.weight_decay, beta_1=recipe.adam_beta1, beta_2=recipe.adam_beta2, **shared
        )
    optimizer.gradient_norm = tf.Variable(
        0.0, trainable=False, name="gradient_norm", aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "embeddings"])
    return optimizer


@contextlib.contextmanager
def averaged(model: Any, optimizer: Any) -> Iterator[None]:
    """Give `model` the moving average of its weights inside the block, if the optimizer keeps one."""
    if not optimizer.use_ema:
        yield
        return
    variables = model.trainable_variables
    trained = [variable.numpy() for variable in variables]
    optimizer.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, trained, strict=True):
            variable.assign(value)
