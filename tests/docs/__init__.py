"""The commands of README and docs/, read out of the pages and run."""
