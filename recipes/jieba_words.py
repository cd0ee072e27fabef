"""Word segmentation with jieba (pip install jieba), for corpus.transform = "recipes/jieba_words.py:words"."""

from __future__ import annotations

import logging

import jieba

jieba.setLogLevel(logging.WARNING)


def words(text: str) -> str:
    """Put a space between Chinese words; lines stay as they are."""
    return "\n".join(" ".join(word for word in jieba.cut(line) if word.strip()) for line in text.split("\n"))
