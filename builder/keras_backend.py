"""TensorFlow and Keras, imported in one place: quietly, and with Keras on TensorFlow whatever the default is."""

from __future__ import annotations

import os
import warnings

os.environ["KERAS_BACKEND"] = "tensorflow"

from serving.support.tensorflow_import import deferred_interrupt, quiet_stderr, tf

with deferred_interrupt(), quiet_stderr():
    import keras

# Attention over a single token is such a softmax, and right.
warnings.filterwarnings("ignore", message="You are using a softmax over axis -1")

ops = keras.ops

__all__ = ["keras", "ops", "tf"]
