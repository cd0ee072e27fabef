"""Fine-tuning from the command line: recipes that fit any base, and settings refused before the text is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.recipe import VerifyRecipe
from builder.stages.train import check_quality
from serving.cli import run
from serving.errors import TrainingError
from tests.tiny_build import Fails, TinyBuild

RECIPES = Path(__file__).parents[3] / "recipes"


def options(tiny: TinyBuild, base: Path, recipe: str, *settings: str) -> list[str]:
    sets = [part for setting in ("name=tiny", *settings) for part in ("--set", setting)]
    return ["--recipe", str(RECIPES / recipe), *sets, "--base", str(base), "--corpus", str(tiny.corpus),
            "--runs", str(tiny.runs)]  # fmt: skip


@pytest.mark.parametrize("recipe", ["fine-tune.toml", "lora.toml", "default.toml", "instruct.toml"])
def test_a_recipe_fits_a_base_with_a_short_context(
    built: TinyBuild, fresh: TinyBuild, recipe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    records = fresh.corpus.with_suffix(".jsonl")
    record = {"signature": "def f():", "docstring": "Return the value of a list."}
    records.write_text("".join(json.dumps({**record, "signature": f"def f{n}():"}) + "\n" for n in range(60)))
    tiny = TinyBuild(records if recipe == "instruct.toml" else fresh.corpus, fresh.runs, fresh.dist)
    settings = options(tiny, built.bundle, recipe)
    assert run(["prepare", *settings]) == 0
    out = capfd.readouterr().out
    rate = "0.0002" if recipe == "lora.toml" else "5e-05"
    assert f"fine-tuned for 3 epochs of 4 x 48 tokens with adamw, learning rate {rate} after 10% of warm-up" in out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.sequence_length=64", "is 64, longer than the context of model.base"),
        ("training.freeze=h.2.*", "'h.2.*' names no weight"),
    ],
)
def test_what_a_base_contradicts_is_told_before_the_text_is_read(
    built: TinyBuild, fresh: TinyBuild, fails: Fails, setting: str, words: str
) -> None:
    fails(["prepare", *options(fresh, built.bundle, "fine-tune.toml", setting)], 2, words)
    assert not (fresh.run / "prepare" / "corpus").exists()


def test_a_model_no_better_than_its_baseline_fails(tiny: TinyBuild, fails: Fails) -> None:
    """Six steps do not beat a trigram."""
    message = fails(tiny.build("verify.better_than=trigram"), 1, "is not below the trigram's", "verify.better_than")
    assert message.count("perplexity") == 1
    fails(["verify", str(tiny.bundle), "--set", "verify.better_than=trigram"], 1, "is not below the trigram's")
    figures = {"validation_perplexity": 5.0, "unigram_perplexity": 6.0, "trigram_perplexity": 5.0}
    check_quality(VerifyRecipe(better_than="unigram"), figures)
    check_quality(VerifyRecipe(), figures)
    with pytest.raises(TrainingError, match=r"5.00 is not below the trigram's 5.00"):
        check_quality(VerifyRecipe(better_than="trigram"), figures)
