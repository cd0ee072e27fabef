"""Protobuf messages from tables, without generated code."""
