"""The certificate's part on text: the graph's tokenizer and its continuations against the bundle's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from builder.tf_export.session_servable import SessionServable
from builder.verification.logit_parity import batches
from serving.errors import ParityError


def compare_text(
    servable: SessionServable,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    candidates: NDArray[np.int64],
    end: int,
    batch_size: int,
) -> dict[str, int]:
    """Compare `tokenize` on the prompts' texts, and greedy `generate_text` with the candidates [prompts, new tokens].

    Only a text that encodes to its prompt again can be continued by the prompt's tokens: the others (a prompt may be
    cut within a word) are encoded only. Returns the numbers of texts `encoded` and `continued`, and how many equal.
    """
    texts = [tokenizer.decode(list(prompt), skip_special_tokens=False) for prompt in prompts]
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    encoded = servable.tokenize(texts)
    rows = [row for row, prompt in enumerate(prompts) if wanted[row] == list(prompt)]
    continued = [
        text
        for some in batches(len(rows), batch_size)
        for text in servable.generate_text([texts[row] for row in rows[some]], max_new_tokens=candidates.shape[1])
    ]
    expected = [tokenizer.decode(_until(candidates[row].tolist(), end)) for row in rows]
    return {
        "encoded": len(texts),
        "encoded_equal": sum(mine == theirs for mine, theirs in zip(encoded, wanted, strict=True)),
        "continued": len(rows),
        "continued_equal": sum(mine == theirs for mine, theirs in zip(continued, expected, strict=True)),
    }


def judge_text(record: dict[str, int]) -> None:
    """Raise ParityError if any text of a record of `compare_text` was not equal."""
    for kind, signature in (("encoded", "tokenize"), ("continued", "generate_text")):
        if record[f"{kind}_equal"] != record[kind]:
            raise ParityError(
                f"parity failed in savedmodel/{signature}: only {record[f'{kind}_equal']} of {record[kind]} texts are "
                f"{kind} as by the bundle's tokenizer; nothing was published"
            )


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
