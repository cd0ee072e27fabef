"""Helpers that know nothing of bundles or models."""
