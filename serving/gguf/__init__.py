"""A bundle as one GGUF file, which llama.cpp and the programs around it read."""

from serving.gguf.convert import OUTTYPES, write_gguf
from serving.gguf.vocabulary import vocabulary

__all__ = ["OUTTYPES", "vocabulary", "write_gguf"]
