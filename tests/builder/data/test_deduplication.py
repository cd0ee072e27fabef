"""Repeats found block by block, with an index on the disk: the same as one pass with everything in memory finds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.data import deduplication, disk_index
from builder.data.deduplication import Copies, NearDuplicates, count_bands, sign
from builder.data.disk_index import DiskIndex
from builder.recipe import CorpusRecipe

SMALL = st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**64 - 1)), max_size=20), max_size=12)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few rows, so that a test has many of them."""
    monkeypatch.setattr(disk_index, "_ROWS", 50)
    monkeypatch.setattr(disk_index, "_PAIRS", 16)
    monkeypatch.setattr(deduplication, "_COMPARED", 8)


@given(batches=SMALL, rows=st.integers(1, 9))
def test_the_index_gives_back_every_pair_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, int]]], rows: int
) -> None:
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_index, "_ROWS", rows)
        patch.setattr(disk_index, "_PAIRS", 4)
        index = DiskIndex(folder / "made", "pairs")
        stored: list[tuple[int, int]] = []
        for batch in batches:
            pairs = np.array(batch, np.uint64).reshape(-1, 2)
            index.add(pairs[:, 0], pairs[:, 1])
            stored += batch
            wanted = np.array([3, 3, 12, 40, 0], np.uint64)
            found = [
                (int(place), int(value))
                for places, values in index.find(wanted)
                for place, value in zip(places, values, strict=True)
            ]
            expected = [(place, value) for place, key in enumerate(wanted) for had, value in stored if had == key]
            assert sorted(found) == sorted(expected)


def test_the_index_holds_few_files_however_much_is_added(tmp_path: Path, small_files: None) -> None:
    index = DiskIndex(tmp_path, "pairs")
    draw = np.random.default_rng(1)
    for _ in range(100):
        keys = draw.integers(0, 2**64, 60, np.uint64)
        index.add(keys, keys)
    assert len(list(tmp_path.iterdir())) <= 7
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 100 * 60 * 16


def test_copies_are_found_in_a_block_and_across_blocks(tmp_path: Path, small_files: None) -> None:
    draw = random.Random(2)
    digests = [draw.randrange(300).to_bytes(8, "big") + draw.randrange(3).to_bytes(8, "big") for _ in range(2000)]
    copies = Copies(tmp_path)
    found = [bool(each) for start in range(0, 2000, 170) for each in copies.repeats(digests[start : start + 170])]
    assert found == [digest in digests[:place] for place, digest in enumerate(digests)]
    assert any(tmp_path.iterdir())


def families(seed: int, count: int) -> list[str]:
    """Texts of which many are much alike, and many a little."""
    draw = random.Random(seed)
    bases = [[f"w{draw.randrange(5000)}" for _ in range(80)] for _ in range(12)]
    texts = []
    for _ in range(count):
        changed = draw.choice([0.0, 0.01, 0.05, 0.3])
        words = [word if draw.random() > changed else f"x{draw.randrange(9999)}" for word in draw.choice(bases)]
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("block", [1, 7, 100, 400])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_the_library_s_own_index(
    tmp_path: Path, small_files: None, threshold: float, block: int
) -> None:
    rensa = pytest.importorskip("rensa")
    recipe = CorpusRecipe(near_threshold=threshold, near_shingle_words=2)
    signatures = sign(families(3, 400), recipe, 5)
    library = rensa.RMinHashDeduplicator(
        threshold, 128, use_lsh=True, num_bands=count_bands(threshold, 128), seed=5
    )  # fmt: skip
    expected = []
    for number, text in enumerate(families(3, 400)):
        signature = rensa.RMinHash(128, 5)
        signature.update(deduplication.shingles(text, 2))
        expected.append(not library.add(str(number), signature))
    near = NearDuplicates(recipe, tmp_path)
    found = [bool(each) for start in range(0, 400, block) for each in near.repeats(signatures[start : start + block])]
    assert found == expected
    assert 50 < sum(expected) < 350
