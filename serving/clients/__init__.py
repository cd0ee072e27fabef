"""Clients of other servers that serve a bundle, imported when they are asked for."""
