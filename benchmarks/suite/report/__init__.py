"""A record as CSV, Markdown and HTML."""
