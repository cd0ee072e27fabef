"""Measurements of serving: the engine alone, and what is in front of it."""
