"""One question each: programs whose answers stand in the decisions."""
