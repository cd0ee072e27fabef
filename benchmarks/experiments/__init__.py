"""Programs that answer one question each; the answers are in docs/decisions/ and docs/benchmarks.md."""
