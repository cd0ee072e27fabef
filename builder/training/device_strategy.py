"""Several GPUs: the batch is split over them, and each keeps a copy of the weights (tf.distribute.MirroredStrategy)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from builder.keras_backend import tf
from builder.recipe import TrainingRecipe
from serving.errors import InputError


@contextlib.contextmanager
def training_devices(recipe: TrainingRecipe) -> Iterator[int]:
    """Make what is created inside live on the recipe's devices, and give their number.

    All GPUs by default. Without any the processor counts as one device, unless TensorFlow was told to split it.
    Raises InputError for more devices than there are, and for a recipe that several cannot run.
    """
    present = [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
    count = recipe.devices or len(present)
    if count > len(present):
        raise InputError(f"recipe key 'training.devices' is {count} and there are {len(present)}; lower it, or set 0")
    if count == 1:
        yield 1
        return
    if recipe.loop == "custom":
        raise InputError(
            f"recipe key 'training.loop' is 'custom', which runs on one device and here are {count}; "
            "set training.loop=fit or training.devices=1"
        )
    if recipe.accumulation > 1:
        raise InputError(
            f"recipe key 'training.accumulation' is {recipe.accumulation}, which needs one device, not {count}; "
            "set it to 1 or training.devices=1"
        )
    if recipe.batch_size % count:
        raise InputError(
            f"recipe key 'training.batch_size' is {recipe.batch_size}, which {count} devices cannot share evenly; "
            "change it or training.devices"
        )
    with tf.distribute.MirroredStrategy(present[:count]).scope():
        yield count
