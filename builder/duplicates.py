"""Near-duplicates by MinHash and locality-sensitive hashing, over one pass of the documents."""

from __future__ import annotations

import re
from typing import Any

from builder.recipe import CorpusRecipe
from serving.errors import RuntimeMissingError

# Scripts that put no spaces between words: Thai to Lao, Myanmar, Khmer, kana, Han. There a character counts as a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


class NearDuplicates:
    """Says of each text whether one much like it came before.

    Two texts are alike by the Jaccard similarity of their sets of shingles, estimated by the share of `num_perm` minima
    on which they agree (Broder, 1997). Bands of rows find the candidates; each is then held to the threshold. Memory
    holds 4 bytes a permutation and the bands' tables for each text kept, measured at 2.3 KB with 128 permutations.
    """

    def __init__(self, recipe: CorpusRecipe, seed: int) -> None:
        try:
            import rensa
        except ModuleNotFoundError:
            raise RuntimeMissingError(
                "corpus.near_duplicates needs rensa; pip install 'gpt2-bundle[build]', or leave it false"
            ) from None
        self._new: Any = rensa.RMinHash
        self._permutations, self._seed, self._shingle = recipe.near_num_perm, seed, recipe.near_shingle_words
        bands = count_bands(recipe.near_threshold, self._permutations)
        self._index = rensa.RMinHashDeduplicator(
            recipe.near_threshold, self._permutations, use_lsh=True, num_bands=bands, seed=seed
        )
        self._count = 0

    def is_repeat(self, text: str) -> bool:
        """Return whether `text` is much like one that was kept; if not, it is kept."""
        signature = self._new(self._permutations, self._seed)
        signature.update(shingles(text, self._shingle))  # A set has no order, and the signature heeds none.
        self._count += 1
        return not self._index.add(str(self._count), signature)


def shingles(text: str, words: int) -> set[str]:
    """Return the runs of `words` words of a text, case folded; all of its words where they are fewer.

    A character is a word in scripts without spaces. A text without any word is its own shingle.
    """
    found: list[str] = (_ASCII_WORD if text.isascii() else _WORD).findall(text.casefold())
    if not found:
        return {text}
    if len(found) <= words:
        return {" ".join(found)}
    return {" ".join(run) for run in zip(*(found[start:] for start in range(words)), strict=False)}


def count_bands(threshold: float, permutations: int) -> int:
    """Return how many bands to cut a signature into: the fewest that still make likely candidates of similar pairs.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s**r)**b, which rises steeply at
    (1/b)**(1/r); that is put a tenth below the threshold, since a missed pair is lost and a false one only checked.
    """
    for bands in range(1, permutations + 1):
        rows = permutations // bands
        if permutations % bands == 0 and (1 / bands) ** (1 / rows) <= 0.9 * threshold:
            return bands
    return permutations
