"""Subcommands of the builder, one file each, imported when they run."""
