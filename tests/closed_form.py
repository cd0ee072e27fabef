"""A language model that is one line of arithmetic, and bundles around it: exact, fast, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serving.backends.base import FloatArray, IntArray, VerifyStep
from serving.bundle import Geometry, Graph, Manifest, Provenance, TensorSpec, write_manifest
from serving.errors import InputError

END = "<|endoftext|>"


def next_token(tokens: Sequence[int], vocab_size: int) -> int:
    """The likeliest token after `tokens`: a function of the last two and of the position."""
    before = tokens[-2] if len(tokens) > 1 else 0
    return (31 * tokens[-1] + 17 * before + 7 * len(tokens) + 3) % vocab_size


def logits_after(tokens: Sequence[int], vocab_size: int) -> FloatArray:
    """[vocab_size] float32: 0 for `next_token`, then falling by 1/8 for each id further on, cyclically."""
    return (-((np.arange(vocab_size) - next_token(tokens, vocab_size)) % vocab_size) / 8).astype(np.float32)


def greedy(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """The `count` likeliest tokens after `prompt`, one after the other."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


@dataclass
class State:
    """What a real backend keeps as keys and values."""

    rows: list[list[int]]
    capacity: int


class ClosedFormBackend:
    """A `Backend` over `logits_after` that holds callers to the protocol: capacities, shapes, types."""

    name = "closed-form"

    def __init__(self, vocab_size: int = 257, n_positions: int = 64) -> None:
        self.vocab_size, self.n_positions = vocab_size, n_positions
        self.prefills: list[tuple[int, int]] = []  # (rows, capacity) of each
        self.decodes = 0

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[State, FloatArray]:
        assert capacity <= self.n_positions
        assert all(1 <= len(prompt) <= capacity for prompt in prompts)
        self.prefills.append((len(prompts), capacity))
        state = State([list(prompt) for prompt in prompts], capacity)
        return state, self._logits(state)

    def decode(self, state: State, tokens: IntArray) -> FloatArray:
        assert tokens.shape == (len(state.rows),) and tokens.dtype == np.int64
        self.decodes += 1
        for row, token in zip(state.rows, tokens.tolist(), strict=True):
            if len(row) >= state.capacity:
                raise InputError(f"a row is at its capacity of {state.capacity}")
            row.append(token)
        return self._logits(state)

    def _logits(self, state: State) -> FloatArray:
        return np.stack([logits_after(row, self.vocab_size) for row in state.rows])


def byte_tokenizer(merges: Sequence[tuple[str, str]] = (), extra: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of the 256 bytes, the end token, `merges`, and `extra` vocabulary entries in that alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, END, *(first + second for first, second in merges), *extra]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def chat_files(template: Any, **settings: Any) -> dict[str, bytes]:
    """The file of a bundle that has a chat template."""
    table = {"eos_token": END, "bos_token": END, "chat_template": template, **settings}
    return {"tokenizer_config.json": json.dumps(table).encode()}


def geometry(vocab_size: int = 257, n_positions: int = 64) -> Geometry:
    """A tiny GPT-2's sizes, the end token last in the vocabulary."""
    return Geometry(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_inner=32,
        layer_norm_epsilon=1e-5,
        activation_function="gelu_new",
        bos_token_id=256,
        eos_token_id=256,
    )


def graphs() -> dict[str, Graph]:
    """One graph of each runtime."""
    ids = TensorSpec("int64", ("batch", "length"))
    logits = TensorSpec("float32", ("batch", "length", 257))
    return {
        "ort/fp32": Graph(
            runtime="onnx",
            path="ort/fp32/model.onnx",
            precision="fp32",
            padding="right",
            cache="shared-buffer",
            inputs={"input_ids": ids, "past_key_values.0.key": TensorSpec("float32", ("batch", 2, "past", 4))},
            outputs={"logits": logits},
        ),
        "savedmodel/serving_default": Graph(
            runtime="tensorflow",
            path="savedmodel/1/saved_model.pb",
            precision="fp32",
            padding="right",
            cache="static",
            inputs={"input_ids": ids},
            outputs={"logits": logits},
            signature="serving_default",
        ),
    }


def write_bundle(folder: Path, name: str = "tiny", extra: Mapping[str, bytes] | None = None) -> Manifest:
    """Write a bundle whose graphs are arbitrary bytes and whose tokenizer is `byte_tokenizer`, and `extra` files."""
    files = {
        "README.md": b"# tiny\n",
        "ort/fp32/model.onnx": name.encode() * 3,
        "ort/fp32/model.onnx_data": bytes(range(256)),
        "savedmodel/1/saved_model.pb": b"\x08\x01",
        "savedmodel/1/variables/variables.index": b"",
        "tokenizer.json": byte_tokenizer().to_str().encode(),
        **(extra or {}),
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return write_manifest(
        folder,
        name=name,
        model=geometry(),
        graphs=graphs(),
        provenance=Provenance(
            recipe={"name": name, "training": {"epochs": 3.0, "paths": ("a", "b")}},
            corpus_sha256="ab" * 32,
            versions={"tensorflow": "2.21.0"},
            seed=1234,
        ),
        quality={"validation_perplexity": 12.5},
        parity={"max_abs": 1.5e-06, "greedy": {"equal": 64, "of": 64}},
        created="2025-01-31T12:00:00Z",
    )


class ClosedFormSlotBackend:
    """A `SlotBackend` over `logits_after` that holds the engine to the protocol.

    Every position remembers whether it was read beside others, so that a prompt on top of positions that a piece of a
    single token, or a decode step, has made is found out; and so is whatever looks at a position that was never
    written. A piece of a single token must be the only one of its chunk.
    """

    name = "closed-form"
    cache_bytes = 0
    verify_step: VerifyStep | None = None

    def __init__(
        self,
        slots: int = 4,
        max_length: int = 64,
        chunk: int = 8,
        copies: bool = True,
        vocab_size: int = 257,
        scored_tokens: int = 8,
    ) -> None:
        self.scored_tokens = scored_tokens
        self.slots, self.max_length, self.n_positions = slots, max_length, max_length
        self.copies, self.vocab_size, self._chunk = copies, vocab_size, chunk
        self._tokens = np.full((slots, max_length), -1)
        self._read = np.zeros((slots, max_length), bool)
        self.calls: list[tuple[str, int]] = []  # ("prefill", tokens), ("decode", rows) or ("copy", positions)
        self.fails: list[str] = []
        self.closed = False

    def prefill_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        self._call("prefill", len(tokens))
        end = start + len(tokens)
        assert tokens and (len(tokens) > 1 or start % self._chunk == 0)
        assert self._read[slot, :start].all(), "positions that no piece of several tokens of a prompt has made"
        self._tokens[slot, start:end], self._read[slot, start:end] = tokens, len(tokens) > 1 or self._chunk == 1
        return self._logits(slot, end)

    def score_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        assert len(tokens) <= self.scored_tokens
        self.prefill_chunk(slot, tokens, start)
        self.calls[-1] = ("score", len(tokens))
        return np.stack([self._logits(slot, start + count + 1) for count in range(len(tokens))])

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        self._call("decode", len(tokens))
        assert tokens.shape == lengths.shape and tokens.dtype == lengths.dtype == np.int64
        rows = np.arange(len(tokens))
        self._tokens[rows, lengths], self._read[rows, lengths] = tokens, False
        return np.stack([self._logits(row, length + 1) for row, length in enumerate(lengths.tolist())])

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._call("copy", length)
        assert self.copies and source != target and length > 0
        for array in (self._tokens, self._read):
            array[target, :length] = array[source, :length]

    def close(self) -> None:
        self.closed = True

    def _call(self, name: str, size: int) -> None:
        self.calls.append((name, size))
        if name in self.fails:
            self.fails.remove(name)
            raise RuntimeError(f"{name} broke\nhere")

    def _logits(self, slot: int, length: int) -> FloatArray:
        tokens = self._tokens[slot, :length]
        assert (tokens >= 0).all(), "a position that was never written"
        return logits_after(tokens.tolist(), self.vocab_size)
