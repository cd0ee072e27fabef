"""Tests of the building side."""
