"""Subcommands of the serving side, one file each, imported when they run."""
