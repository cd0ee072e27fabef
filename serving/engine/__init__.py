"""Continuous batching: many requests, each begun and ended on its own, share every step of one model."""
