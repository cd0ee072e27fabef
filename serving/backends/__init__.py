"""Runtimes that run a bundle's graphs, one file each, imported only when asked for by name."""
