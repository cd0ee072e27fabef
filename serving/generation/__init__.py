"""Prompts to tokens on any backend: what programs import."""

from serving.generation.batch import Generation, generate, stream, token_budget

__all__ = ["Generation", "generate", "stream", "token_budget"]
