"""One question each: programs whose answers stand in docs/decisions/."""
