"""The benchmark suite: schedules played against targets, and what is said of them afterwards."""
