"""The command `bench` and what it does with scenarios."""
