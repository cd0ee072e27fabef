"""The model as a SavedModel for TensorFlow Serving."""
