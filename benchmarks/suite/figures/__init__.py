"""Figures from timestamps: pure functions."""
