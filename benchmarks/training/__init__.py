"""Training throughput and validation loss beside torch and KerasHub: `make bench-training`."""
