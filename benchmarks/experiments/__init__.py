"""Programs that answer one question each; the answers are in docs/decisions.md and docs/benchmarks.md."""
