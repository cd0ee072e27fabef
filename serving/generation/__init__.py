"""Generation of token ids on any backend: the public functions."""

from serving.generation.batch import Generation, generate, stream, token_budget

__all__ = ["Generation", "generate", "stream", "token_budget"]
