"""TensorFlow Serving's protocol, by REST and gRPC."""
