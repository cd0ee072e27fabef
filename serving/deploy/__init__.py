"""Folders that other servers serve a bundle from."""
