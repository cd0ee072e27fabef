"""Is the suite itself right: known servers, the cost of its own client."""
