"""Recipes: TOML and overrides become a checked tree, and each mistake is named with what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.recipe import PRESETS, Recipe
from builder.recipe_reader import read_recipe
from serving.errors import InputError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every (dotted key, field, value) of a recipe."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


LEAVES = {key: (field, value) for key, field, value in leaves(Recipe())}


def as_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_anything_it_is_the_default() -> None:
    assert read_recipe() == Recipe()


@pytest.mark.parametrize("key", LEAVES)
def test_every_default_is_within_its_own_bounds_and_explained(key: str) -> None:
    field, value = LEAVES[key]
    section, _, name = key.rpartition(".")
    needs = {"training.momentum": ["training.optimizer=sgd"]}.get(key, [])
    inner = getattr(read_recipe(None, [f"{key}={as_toml(value)}", *needs]), section) if section else read_recipe()
    assert getattr(inner, name) == value
    assert len(field.metadata["help"]) > 10 and field.metadata["help"].endswith(".")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_that_come_with_the_project_are_read(path: Path) -> None:
    assert read_recipe(path).name


def test_file_then_overrides_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "mine"\nseed = 7\n[training]\nepochs = 2\n[corpus]\npaths = ["a"]\n')
    recipe = read_recipe(path, ["seed=8", "training.epochs=1", "training.epochs=0.5", "corpus.paths=b c.txt"])
    assert (recipe.name, recipe.seed, recipe.training.epochs, recipe.corpus.paths) == ("mine", 8, 0.5, ("b c.txt",))


def test_values_are_toml_or_bare_text() -> None:
    recipe = read_recipe(None, ['corpus.paths=["a", "b=c"]', "name = bare-text", "corpus.deduplicate=false"])
    assert (recipe.corpus.paths, recipe.name, recipe.corpus.deduplicate) == (("a", "b=c"), "bare-text", False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_their_geometry(name: str) -> None:
    model = read_recipe(None, [f"model.preset={name}", "training.sequence_length=8"]).model
    assert (model.n_layer, model.n_embd, model.n_head, model.n_positions) == PRESETS[name]
    assert model == read_recipe(None, [f"model.{key}={getattr(model, key)}" for key in GEOMETRY]).model


GEOMETRY = ("n_layer", "n_embd", "n_head", "n_positions")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", ["'training.epoch' is unknown", "did you mean 'epochs'"]),
        ("trainin.epochs=3", ["'trainin' is unknown", "'training'"]),
        ("naem=x", ["'naem' is unknown", "'name'"]),
        ("training.=3", ["'training.' is unknown"]),
        ("training=3", ["'training' is a section"]),
        ("training.epochs.x=3", ["'training.epochs' takes a number"]),
        ("training.epochs", ["write it as key=value"]),
        ("=3", ["write it as key=value"]),
        ("training.epochs=three", ["'training.epochs' takes a number", "'three'"]),
        ("training.epochs=", ["takes a number"]),
        ("training.epochs=true", ["takes a number"]),
        ("training.batch_size=2.5", ["takes an integer"]),
        ("training.batch_size=true", ["takes an integer"]),
        ("training.jit_compile=1", ["takes true or false"]),
        ("name=12", ["'name' takes text"]),
        ("corpus.paths=[1]", ["takes a list of strings"]),
        ("corpus.paths=3", ["takes a list of strings"]),
        ("training.optimizer=moun", ["'training.optimizer' is 'moun'", "did you mean 'muon'"]),
        ("training.batch_size=0", ["must be from 1 to"]),
        ("training.batch_size=65537", ["must be from 1 to 65536"]),
        ("training.adam_beta2=1.0", ["must be from 0.0 to"]),
        ("training.max_grad_norm=0", ["must be at least"]),
        ("training.learning_rate=-1e-3", ["must be from"]),
        ("training.learning_rate=nan", ["'training.learning_rate'", "nan"]),
        ("training.learning_rate=inf", ["'training.learning_rate'", "inf"]),
        ("training.max_grad_norm=inf", ["'training.max_grad_norm'", "inf"]),
        ("training.epochs=1" + "0" * 400, ["'training.epochs'"]),
        ("corpus.min_characters=1" + "0" * 30, ["'corpus.min_characters'"]),
        ("corpus.min_characters=1" + "0" * 5000, ["takes an integer"]),
        ("corpus.min_characters=0x" + "f" * 5000, ["too large"]),
        ("corpus.encoding=gb18031", ["'corpus.encoding' is 'gb18031'", "did you mean 'gb18030'"]),
        ("corpus.encoding=hex", ["not a text encoding"]),
        ("corpus.max_characters=3", ["'corpus.max_characters' is 3, less than corpus.min_characters 20"]),
        ("corpus.balance=up", ["'corpus.balance' is 'up'", "corpus.label_field"]),
        ("corpus.label_cap=3", ["'corpus.label_cap' is 3", "set balance to 'cap'"]),
        ("corpus.label_field=a", ["'corpus.label_field'", "set corpus.paths"]),
        ("cleaning.unicode=NFD", ["'cleaning.unicode' is 'NFD'", "NFC"]),
        ("seed=-1", ["'seed'", "must be from 0"]),
        ("name=../up", ["'name'", "use letters"]),
        ("name=", ["'name'"]),
        ("corpus.paths=" + r'["a\u0000b"]', ["'corpus.paths'"]),
        ("model.base=" + r'"a\u0000b"', ["'model.base'"]),
        ("seed=" + "[" * 5000, ["'seed'"]),
    ],
)  # fmt: skip
def test_what_an_override_may_not_say(override: str, words: list[str]) -> None:
    message = refusal(override)
    for word in words:
        assert word in message
    assert len(message) < 500


def test_an_unknown_preset_names_the_nearest() -> None:
    assert "'gpt2-large'" in refusal("model.preset=gpt2-lrage")


def test_heads_must_divide_the_width() -> None:
    assert "does not divide n_embd 256" in refusal("model.n_embd=256", "model.n_head=3")


def test_a_row_must_fit_the_context() -> None:
    assert "longer than model.n_positions 64" in refusal("model.n_positions=64", "training.sequence_length=65")
    assert read_recipe(None, ["model.n_positions=64", "training.sequence_length=64"]).training.sequence_length == 64
    for context, expected in ((16, 16), (512, 512), (1024, 512)):
        recipe = read_recipe(None, [f"model.n_positions={context}", "training.sequence_length=0"])
        assert recipe.training.sequence_length == expected
    assert "must be 0 or from 8 on" in refusal("training.sequence_length=7")
    # A base checkpoint has a context of its own, known only when it is read.
    assert read_recipe(None, ["model.base=gpt2", "training.sequence_length=1024"]).model.base == "gpt2"


@pytest.mark.parametrize("key", GEOMETRY)
def test_a_preset_and_a_size_of_its_own_contradict_each_other(key: str) -> None:
    message = refusal("model.preset=nano", f"model.{key}=64")
    assert "model.preset" in message and f"model.{key}" in message


@pytest.mark.parametrize("other", ["model.preset=nano", "model.n_layer=2", "model.vocab_size=50257"])
def test_a_base_and_a_geometry_contradict_each_other(other: str) -> None:
    message = refusal("model.base=gpt2", other)
    assert "model.base" in message and other.partition("=")[0] in message
    assert read_recipe(None, ["model.base=gpt2", 'model.preset=""']).model.base == "gpt2"


def test_with_a_base_the_defaults_are_those_of_a_fine_tune(tmp_path: Path) -> None:
    training = read_recipe(None, ["model.base=gpt2"]).training
    assert (training.optimizer, training.learning_rate, training.warmup_fraction) == ("adamw", 5e-5, 0.1)
    assert (training.weight_decay, training.sequence_length) == (0.01, 0)
    path = tmp_path / "r.toml"
    path.write_text('[model]\nbase = "gpt2"\n[training]\nlearning_rate = 1e-4\n')
    training = read_recipe(path, ["training.epochs=7"]).training
    assert (training.learning_rate, training.epochs, training.optimizer) == (1e-4, 7.0, "adamw")


def test_the_tokenizer_is_the_bases() -> None:
    message = refusal("model.base=gpt2", "tokenizer.vocab_size=300")
    assert "'tokenizer.vocab_size' has no use with model.base 'gpt2'" in message


def test_a_key_that_the_optimizer_does_not_read_is_refused() -> None:
    for optimizer, key in (
        ("adam", "weight_decay"),
        ("sgd", "adam_beta2"),
        ("adamw", "momentum"),
        ("muon", "momentum"),
    ):
        message = refusal(f"training.optimizer={optimizer}", f"training.{key}=0.5")
        assert f"'training.{key}' has no use with training.optimizer {optimizer!r}" in message
    assert read_recipe(None, ["training.optimizer=adam"]).training.weight_decay == 0.0
    assert read_recipe(None, ["training.optimizer=adam", "training.weight_decay=0"]).training.weight_decay == 0.0
    assert read_recipe(None, ["training.optimizer=sgd", "training.momentum=0.5"]).training.momentum == 0.5


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert "no recipe at" in refusal(path=tmp_path / "none.toml")
    assert "not a text file" in refusal(path=tmp_path)
    path = tmp_path / "r.toml"
    path.write_bytes(bytes(range(256)))
    assert "not a text file" in refusal(path=path)
    assert "no recipe at" in refusal(path=path / "below.toml")
    path.write_text("[training\nepochs = 3")
    assert "not valid TOML" in refusal(path=path)
    path.write_text("seed = 1\nseed = 2")
    assert "not valid TOML" in refusal(path=path)
    path.write_text("x = " + "[" * 5000)
    assert "not valid TOML" in refusal(path=path)
    path.write_text("seed = 1" + "0" * 5000)
    assert "not valid TOML" in refusal(path=path)
    path.write_text("[training]\nepochs = 3\n[traning]\n")
    assert "'traning' is unknown" in refusal(path=path)
    path.write_text("[[training]]\nepochs = 3\n")
    assert "'training' is a section" in refusal(path=path)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("seed = 7\n", encoding="utf-8-sig")
    assert read_recipe(tmp_path / "r.toml").seed == 7


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "r.toml").touch()
    assert read_recipe(tmp_path / "r.toml") == Recipe()


def test_the_parts_of_a_batch_must_be_of_one_size() -> None:
    assert "does not divide training.batch_size 16" in refusal("training.accumulation=3")
    assert read_recipe(None, ["training.accumulation=4"]).training.accumulation == 4


def test_variants_are_named_once_and_are_known() -> None:
    assert read_recipe().export.variants == ("int8", "int4")
    assert read_recipe(None, ["export.variants=[]"]).export.variants == ()
    for value, words in (('["int8", "int8"]', "names one twice"), ('["int9"]', "did you mean 'int8'")):
        with pytest.raises(InputError, match=words):
            read_recipe(None, [f"export.variants={value}"])
