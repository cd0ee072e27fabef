"""Measurements of latency and throughput. A client of the engine, never a part of it."""
