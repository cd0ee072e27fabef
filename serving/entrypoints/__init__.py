"""The HTTP and gRPC servers as processes, and how they load and replace models."""
