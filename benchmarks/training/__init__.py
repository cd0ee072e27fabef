"""Training throughput and validation loss compared with torch and KerasHub: `make bench-training`."""
