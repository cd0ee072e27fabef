"""The model as ONNX graphs in every precision."""
