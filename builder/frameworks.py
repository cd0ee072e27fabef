"""TensorFlow and Keras, imported in one place: quietly, and with Keras on TensorFlow whatever the default is."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

from serving.quiet_tensorflow import deferred_interrupt, quiet_stderr, tf

with deferred_interrupt(), quiet_stderr():
    import keras

ops = keras.ops

__all__ = ["keras", "ops", "tf"]
