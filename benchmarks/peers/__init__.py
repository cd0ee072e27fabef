"""Decode and prefill beside other runtimes, each in an environment and a process of its own."""
