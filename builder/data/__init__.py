"""Text files to packed token shards."""
