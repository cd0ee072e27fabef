"""The Open Inference Protocol, by HTTP and gRPC."""
