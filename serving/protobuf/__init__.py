"""Protobuf messages from short tables, and what is read by them."""
