"""Byte-level BPE inside a TensorFlow graph: text to token ids and back, as the `tokenizers` library does it.

Only core TensorFlow ops are used; the tables are variables, so neither the graph's proto nor constant folding carries
them. Text is bytes: what is not valid UTF-8 is read as Python's bytes.decode("utf-8", errors="replace") reads it, one
U+FFFD for each longest part that could have begun a character (The Unicode Standard, section 3.9), and the result is
what the library gives for that string.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from builder.keras_backend import tf
from builder.tf_export.byte_pair_tables import OTHER, SPACE, byte_pair_tables

_NEVER = 2**31 - 1
_APOSTROPHE, _BLANK = ord("'"), ord(" ")
_ENDINGS = ("s", "t", "m", "d", "re", "ve", "ll")
_HOST = "/device:CPU:0"


class GraphTokenizer(tf.Module):  # type: ignore[misc]
    """A tokenizer that has no `builder.tf_export.byte_pair_tables.problem`, as graph code over tables of its own."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's; ids above those of the tokenizer decode to nothing."""
        super().__init__(name="tokenizer")
        tables = byte_pair_tables(tokenizer, vocab_size)
        self.longest, self._base, self._added = tables.longest, tables.base, dict(tables.added)
        self._one_by_one = not tables.pair_together.all()
        with tf.device(_HOST):
            self.class_starts = _table(tables.class_starts)
            self.classes = _table(tables.classes)
            self.byte_ids = _table(tables.byte_ids)
            self.pair_keys = _table(tables.pair_keys)
            self.pair_ranks = _table(tables.pair_ranks)
            self.pair_results = _table(tables.pair_results)
            self.pair_together = _table(tables.pair_together)
            self.token_bytes = _table(tables.token_bytes)

    def added_text(self, token_id: int) -> str | None:
        """Return the text of an added token, such as `<|endoftext|>`; None for any other id."""
        return next((text for text, added in self._added.items() if added == token_id), None)

    def encode(self, text: Any) -> Any:
        """Return the token ids of `text` [batch] string, a ragged tensor [batch, (tokens)] int32.

        An added token's characters, such as `<|endoftext|>`, stand for the token, as in the library.
        """
        with tf.device(_HOST):
            characters = tf.strings.unicode_decode(text, "UTF-8", errors="replace")
            points, row = characters.values, characters.value_rowids()
            starts = tf.reshape(tf.where(self._word_starts(points, row)), [-1])
            words = tf.strings.unicode_encode(_ragged_from_starts(points, starts), "UTF-8")
            different, place = tf.unique(words, out_idx=tf.int64)
            tokens = tf.gather(self._encode_words(different), place)
            rows = tf.RaggedTensor.from_value_rowids(
                tokens, tf.gather(row, starts), nrows=tf.shape(text, tf.int64)[0], validate=False
            )
            return rows.merge_dims(1, 2)

    def decode(self, token_ids: Any, lengths: Any) -> Any:
        """Return the text [batch] string of the first `lengths` [batch] of `token_ids` [batch, sequence] in each row.

        Special tokens are skipped and bytes that form no character become U+FFFD, so it is always valid UTF-8.
        """
        with tf.device(_HOST):
            inside = tf.range(tf.shape(token_ids)[1])[None, :] < lengths[:, None]
            pieces = tf.where(inside, tf.gather(self.token_bytes, token_ids), "")
            return tf.strings.unicode_transcode(tf.strings.reduce_join(pieces, axis=1), "UTF-8", "UTF-8", "replace")

    def _word_starts(self, points: Any, row: Any) -> Any:
        """Where a word of GPT-2's pattern, or an added token, begins: [characters] bool.

        The pattern is 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+. Each of its
        decisions shows in the neighboring characters, so no regular expression is needed.
        """
        begins, covered, cut = self._added_tokens(points, row)
        # A part is what the pattern is run on: a row, or what lies between added tokens.
        part_begins = cut | (_behind(row, 1, -1) != row)
        part = tf.cumsum(tf.cast(part_begins, tf.int32))

        def ahead(values: Any, count: int) -> Any:
            return tf.where(_ahead(part, count, -1) == part, _ahead(values, count, -1), -1)

        at = tf.searchsorted(self.class_starts, points, side="right") - 1
        kind = tf.gather(self.classes, at)
        kind_before = tf.where(part_begins, -1, _behind(kind, 1, -1))
        after_blank = ~part_begins & (_behind(points, 1, -1) == _BLANK)
        kind_after = ahead(kind, 1)

        # A blank is the beginning of the word after it; white space before something else gives up its last character.
        space = kind == SPACE
        space_starts = (kind_before != SPACE) | ((kind_after != SPACE) & (kind_after != -1))
        starts = tf.where(space, space_starts, ~after_blank & (kind_before != kind))

        apostrophe = (points == _APOSTROPHE) & ~after_blank & (kind_before != OTHER)
        following = [ahead(points, 1), ahead(points, 2)]
        for ending in _ENDINGS:
            found = apostrophe
            for letter, point in zip(ending, following, strict=False):
                found &= point == ord(letter)
            starts = (starts & ~_behind(found, 1, False)) | _behind(found, 1 + len(ending), False)
        return tf.where(covered, begins, starts)

    def _added_tokens(self, points: Any, row: Any) -> tuple[Any, Any, Any]:
        """Where added tokens begin, which characters they cover, and where a new part begins, all [characters] bool."""
        begins = covered = cut = tf.zeros_like(points, tf.bool)
        for text in self._added:
            found = _ahead(row, len(text) - 1, -1) == row
            for offset, character in enumerate(text):
                found &= _ahead(points, offset, -1) == ord(character)
            count = tf.cumsum(tf.cast(found, tf.int32))
            begins |= found
            covered |= count > _behind(count, len(text), 0)
            cut |= found | _behind(found, len(text), False)
        return begins, covered, cut

    def _encode_words(self, words: Any) -> Any:
        """Token ids of each of `words` [words] string, which are different: a ragged tensor [words, (tokens)]."""
        added = tf.fill(tf.shape(words), -1)
        for text, token in self._added.items():
            added = tf.where(words == text.encode("utf-8"), token, added)
        lengths = tf.strings.length(words)
        word = tf.repeat(tf.range(tf.size(words)), lengths)
        letters = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(words), tf.uint8), tf.int32)
        whole = tf.gather(added, word)
        symbols = tf.where(whole >= 0, whole, tf.gather(self.byte_ids, letters))
        kept = (whole < 0) | (_behind(word, 1, -1) != word)
        symbols, word = tf.boolean_mask(symbols, kept), tf.boolean_mask(word, kept)
        if self.pair_keys.shape[0]:
            symbols, word, _ = tf.while_loop(
                lambda symbols, word, changed: changed,
                lambda symbols, word, changed: self._merge(symbols, word, tf.size(words)),
                (symbols, word, tf.constant(True)),
                shape_invariants=(tf.TensorShape([None]), tf.TensorShape([None]), tf.TensorShape([])),
            )
        return tf.RaggedTensor.from_value_rowids(
            symbols, tf.cast(word, tf.int64), nrows=tf.size(words, tf.int64), validate=False
        )

    def _merge(self, symbols: Any, word: Any, words: Any) -> tuple[Any, Any, Any]:
        """In each word, merge the pair of the lowest rank, from left to right; and whether any word had one.

        `symbols` and `word` [symbols] are ids and the number of their word; the last symbol starts no pair. The
        library merges the leftmost pair of the lowest rank and looks again; wherever it comes at once upon the same
        pair further on, both are done here in one step.
        """
        key = tf.cast(symbols, tf.int64) * self._base + tf.cast(_ahead(symbols, 1, 0), tf.int64)
        at = tf.minimum(tf.searchsorted(self.pair_keys, key), self.pair_keys.shape[0] - 1)
        known = (tf.gather(self.pair_keys, at) == key) & (_ahead(word, 1, -1) == word)
        rank = tf.where(known, tf.gather(self.pair_ranks, at), _NEVER)
        chosen = known & (rank == tf.gather(tf.math.unsorted_segment_min(rank, word, words), word))

        place = tf.range(tf.size(symbols))
        if self._one_by_one:
            first = tf.math.unsorted_segment_min(tf.where(chosen, place, _NEVER), word, words)
            chosen &= tf.gather(self.pair_together, at) | (place == tf.gather(first, word))
        # Pairs that share a symbol are of the kind (a, a): of a row of them every other one is merged.
        row_begins = chosen & ~_behind(chosen, 1, False)
        rows = tf.cumsum(tf.cast(row_begins, tf.int32))
        begin = tf.gather(tf.concat([[0], tf.boolean_mask(place, row_begins)], 0), rows)
        chosen &= (place - begin) % 2 == 0

        merged = tf.where(chosen, tf.gather(self.pair_results, at), symbols)
        kept = ~_behind(chosen, 1, False)
        return tf.boolean_mask(merged, kept), tf.boolean_mask(word, kept), tf.reduce_any(chosen)


def _table(values: Any) -> Any:
    return tf.Variable(values, trainable=False)


def _ahead(values: Any, count: int, fill: Any) -> Any:
    """`values` [n] moved `count` places to the front: place i holds what stood at i + count, or `fill`."""
    return tf.concat([values, tf.fill([count], tf.cast(fill, values.dtype))], 0)[count:]


def _behind(values: Any, count: int, fill: Any) -> Any:
    """`values` [n] moved `count` places to the back: place i holds what stood at i - count, or `fill`."""
    return tf.concat([tf.fill([count], tf.cast(fill, values.dtype)), values], 0)[: tf.size(values)]


def _ragged_from_starts(values: Any, starts: Any) -> Any:
    return tf.RaggedTensor.from_row_starts(values, starts, validate=False)
