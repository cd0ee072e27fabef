"""Decode and prefill on a GPU: ONNX Runtime, TensorFlow, TensorFlow Serving and torch, one after the other."""
