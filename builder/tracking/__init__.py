"""Experiment trackers that a build reports to, each by its own client in a process of its own."""
