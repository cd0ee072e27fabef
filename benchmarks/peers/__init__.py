"""Decode and prefill of the bundle and of other runtimes, each in its own environment and process."""
