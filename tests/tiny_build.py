"""A whole build that takes seconds: its text, its options, and the folders that it fills."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# Runs a command that must fail with an exit code and some words; gives its one line (see the fixture "fails").
Fails = Callable[..., str]

SENTENCE = "return the value of a list string number index key when given function module error raises else none"
SETTINGS = (
    "name=tiny",
    "model.n_positions=48",
    "model.n_embd=32",
    "model.n_layer=2",
    "model.n_head=2",
    "tokenizer.vocab_size=300",
    "training.sequence_length=32",
    "training.batch_size=4",
    "training.epochs=0.1",
    "training.jit_compile=false",
    "verify.prompts=4",
    "verify.batch_size=3",
    "verify.new_tokens=6",
    "verify.perplexity_tokens=96",
)


def write_corpus(path: Path, lines: int = 400) -> Path:
    """Sentences of a few words, the same ones every time."""
    choose = random.Random(7)
    sentences = (" ".join(choose.choices(SENTENCE.split(), k=choose.randint(4, 9))) for _ in range(lines))
    path.write_text("".join(f"{sentence.capitalize()}.\n" for sentence in sentences), encoding="utf-8")
    return path


@dataclass(frozen=True)
class TinyBuild:
    """Where a tiny build's text, stages and bundles are."""

    corpus: Path
    runs: Path
    dist: Path
    settings: tuple[str, ...] = SETTINGS

    @property
    def run(self) -> Path:
        return self.runs / "tiny"

    @property
    def bundle(self) -> Path:
        return self.dist / "tiny"

    def options(self, *overrides: str) -> list[str]:
        """The command line's options but for --output, which only `build` takes."""
        sets = [part for setting in (*self.settings, *overrides) for part in ("--set", setting)]
        return [*sets, "--corpus", str(self.corpus), "--runs", str(self.runs)]

    def build(self, *overrides: str) -> list[str]:
        """The arguments of `gpt2-bundle build`."""
        return ["build", *self.options(*overrides), "--output", str(self.dist)]

    def copy(self, folder: Path) -> TinyBuild:
        """The same build with stages and bundles of its own, as far on as this one (the text is shared)."""
        ours = replace(self, runs=folder / "runs", dist=folder / "dist")
        for source, target in ((self.runs, ours.runs), (self.dist, ours.dist)):
            if source.exists():
                shutil.copytree(source, target)
        return ours


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
