"""Targets of the suite, imported when they are asked for."""
