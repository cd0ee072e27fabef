"""Copies and near-duplicates among the documents, a block of them at a time, in memory that does not grow with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.disk_index import DiskIndex, Numbers
from builder.recipe import CorpusRecipe
from serving.errors import RuntimeMissingError

Signatures = NDArray[np.uint32]

# Scripts that put no spaces between words: Thai to Lao, Myanmar, Khmer, kana, Han. There a character counts as a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_COMPARED = 1 << 13


class Copies:
    """Says of each digest whether an equal one came before. The disk holds 16 bytes a digest."""

    def __init__(self, scratch: Path) -> None:
        self._index = DiskIndex(scratch, "digests")

    def repeats(self, digests: Sequence[bytes]) -> NDArray[np.bool_]:
        """Return which of the digests, 16 bytes each, came before, here or in an earlier call: bool [n]."""
        halves = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
        repeated = np.zeros(len(digests), np.bool_)
        for places, others in self._index.find(halves[:, 0]):
            repeated[places[halves[places, 1] == others]] = True
        first: dict[bytes, int] = {}
        for place, digest in enumerate(digests):
            repeated[place] |= first.setdefault(digest, place) != place
        self._index.add(halves[~repeated, 0], halves[~repeated, 1])
        return repeated


class NearDuplicates:
    """Says of each signature whether one much like it came before.

    Two texts are alike by the Jaccard similarity of their sets of shingles, estimated by the share of minima on which
    their MinHash signatures agree (Broder, 1997). Bands of rows find the candidates among what was kept; each is then
    held to the threshold. Memory holds what a block needs; the disk, for each text kept, 4 bytes a permutation and 16
    a band: 768 bytes with the defaults.
    """

    def __init__(self, recipe: CorpusRecipe, scratch: Path) -> None:
        self._threshold, self._permutations = recipe.near_threshold, recipe.near_num_perm
        self._bands = count_bands(recipe.near_threshold, recipe.near_num_perm)
        self._index = DiskIndex(scratch, "bands")
        self._path, self._kept = scratch / "signatures", 0

    def repeats(self, signatures: Signatures) -> NDArray[np.bool_]:
        """Return which texts of a block are much like one that was kept before them, bool [n]; the others are kept.

        `signatures` is uint32 [n, permutations], as `sign` gives them.
        """
        keys = self._band_keys(signatures)
        repeated = self._like_kept(signatures, keys)
        self._mark_within(signatures, keys, repeated)
        kept = np.flatnonzero(~repeated)
        numbers = self._kept + np.arange(len(kept), dtype=np.uint64)
        self._index.add(keys[kept].ravel(), np.repeat(numbers, self._bands))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            signatures[kept].tofile(file)
        self._kept += len(kept)
        return repeated

    def _band_keys(self, signatures: Signatures) -> Numbers:
        """A hash of each band of each signature, uint64 [n, bands]; no two bands share any but by chance."""
        count, rows = len(signatures), self._permutations // self._bands
        values = signatures.reshape(count, self._bands, rows).astype(np.uint64)
        keys = np.broadcast_to(np.arange(1, self._bands + 1, dtype=np.uint64), (count, self._bands))
        for row in range(rows):
            keys = (keys ^ values[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        return keys

    def _like_kept(self, signatures: Signatures, keys: Numbers) -> NDArray[np.bool_]:
        repeated = np.zeros(len(signatures), np.bool_)
        for places, numbers in self._index.find(keys.ravel()):
            pairs = np.unique(np.stack([places // self._bands, numbers.astype(np.intp)], axis=1), axis=0)
            for start in range(0, len(pairs), _COMPARED):
                part = pairs[start : start + _COMPARED]
                part = part[~repeated[part[:, 0]]]
                others, which = np.unique(part[:, 1], return_inverse=True)
                agree = (signatures[part[:, 0]] == self._read(others)[which]).mean(axis=1)
                repeated[part[agree >= self._threshold, 0]] = True
        return repeated

    def _read(self, numbers: NDArray[np.intp]) -> Signatures:
        length = 4 * self._permutations
        with self._path.open("rb", buffering=0) as file:
            parts = [file.read(length) for number in numbers.tolist() if file.seek(number * length) >= 0]
        return np.frombuffer(b"".join(parts), np.uint32).reshape(-1, self._permutations)

    def _mark_within(self, signatures: Signatures, keys: Numbers, repeated: NDArray[np.bool_]) -> None:
        """Mark documents that are similar to an earlier one of the same block that stays."""
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shared = (counts[inverse.reshape(keys.shape)] > 1) & ~repeated[:, None]
        kept: dict[int, list[int]] = {}
        for place in np.flatnonzero(shared.any(axis=1)).tolist():
            own = keys[place, shared[place]].tolist()
            candidates = sorted({other for key in own for other in kept.get(key, ())})
            agree = (signatures[candidates] == signatures[place]).mean(axis=1) if candidates else np.zeros(0)
            if (agree >= self._threshold).any():
                repeated[place] = True
            else:
                for key in own:
                    kept.setdefault(key, []).append(place)


def sign(texts: Sequence[str], recipe: CorpusRecipe, seed: int) -> Signatures:
    """Return the MinHash signatures of texts, uint32 [n, near_num_perm]. Raises as `require_rensa` does."""
    new = require_rensa()
    signatures = np.empty((len(texts), recipe.near_num_perm), np.uint32)
    for place, text in enumerate(texts):
        signature = new(recipe.near_num_perm, seed)
        signature.update(shingles(text, recipe.near_shingle_words))  # A set has no order, and the signature heeds none.
        signatures[place] = signature.digest()
    return signatures


def require_rensa() -> Any:
    """Return the library's MinHash; RuntimeMissingError if it is not installed."""
    try:
        import rensa
    except ModuleNotFoundError:
        raise RuntimeMissingError(
            "corpus.near_duplicates needs rensa; pip install 'gpt2-bundle[build]', or leave it false"
        ) from None
    return rensa.RMinHash


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
