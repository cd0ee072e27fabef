"""Read a recipe: TOML file, then `--set key=value` overrides, each key and value checked by name."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from builder.data.instructions import Template
from builder.data.text_decoding import check_encoding
from builder.data.transforms import check_transform
from builder.recipe import FINE_TUNING, NO_USE, ModelRecipe, Recipe, fit_context, resolve_preset
from serving.errors import InputError
from serving.support.suggestions import did_you_mean

_LIMIT = 2**63
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def read_recipe(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a TOML file (or the default one) with `key.path=value` overrides applied.

    Raises InputError, naming the key and the nearest known one, for an unknown key, a value of the wrong type or out
    of bounds, and for settings that contradict each other.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"no recipe at {path}; the ones that come with the project are in recipes/") from None
        except (IsADirectoryError, UnicodeDecodeError):
            raise InputError(f"recipe {path}: not a text file; name a .toml file") from None
        except ValueError as error:  # The parser's own error is one, and so is that of a number of 5,000 digits.
            raise InputError(f"recipe {path}: not valid TOML: {error}") from None
        except RecursionError:
            raise InputError(f"recipe {path}: not valid TOML: nested too deep") from None
    for override in overrides:
        _apply_override(table, override)
    recipe: Recipe = _build(Recipe, table, prefix="")
    _check_model_keys(table, recipe.model)
    recipe = dataclasses.replace(recipe, model=resolve_preset(recipe.model))
    recipe = _with_training_defaults(recipe, table.get("training", {}))
    _check_consistency(recipe)
    # The context of a base is known only when it is read.
    return recipe if recipe.model.base else fit_context(recipe, recipe.model.n_positions)


def _with_training_defaults(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """Put the defaults that depend on other keys in place of the dataclass's: those of a base and of an optimizer.

    Raises InputError for a key that is `given` and has no use with the optimizer.
    """
    defaults = {key: value for key, value in FINE_TUNING.items() if recipe.model.base and key not in given}
    training = dataclasses.replace(recipe.training, **defaults)
    for key in NO_USE[training.optimizer]:
        if given.get(key):
            raise InputError(
                f"recipe key 'training.{key}' has no use with training.optimizer {training.optimizer!r}; "
                "leave it out, or choose another optimizer"
            )
    if "weight_decay" in NO_USE[training.optimizer]:
        training = dataclasses.replace(training, weight_decay=0.0)
    return dataclasses.replace(recipe, training=training)


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {override!r}: write it as key=value, for example --set training.epochs=3")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {override!r}: {section!r} is a value, not a section")
        table = inner
    table[last] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """A TOML value, or the bare text where it is none (so that strings need no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _build(cls: type, table: dict[str, Any], prefix: str) -> Any:
    types = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = prefix + key
        if key not in known:
            raise InputError(f"recipe key {where!r} is unknown{did_you_mean(key, known)}")
        kind = types[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise InputError(f"recipe key {where!r} is a section; set one of its keys, as in {where}.KEY=VALUE")
            values[key] = _build(kind, value, where + ".")  # type: ignore[arg-type]
        else:
            values[key] = _checked(where, kind, value, known[key].metadata)
    return cls(**values)


def _checked(where: str, kind: Any, value: Any, metadata: Any) -> Any:
    if type(value) is int and not -_LIMIT <= value < _LIMIT:
        raise InputError(f"recipe key {where!r} is too large a number; it must fit in 64 bits")
    if kind is float and type(value) is int:
        value = float(value)
    if kind == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise InputError(f"recipe key {where!r} takes a list of strings, not {reprlib.repr(value)}")
        if any("\0" in item for item in items):
            raise InputError(f"recipe key {where!r} holds a null character, which no path may")
        choices = metadata.get("choices")
        for item in items:
            if choices and item not in choices:
                raise InputError(f"recipe key {where!r} holds {item!r}{did_you_mean(item, choices)}")
        return tuple(items)
    if type(value) is not kind:
        raise InputError(f"recipe key {where!r} takes {_WORDS[kind]}, not {reprlib.repr(value)}")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"recipe key {where!r} holds a null character; take it out")
    low, high, choices = metadata.get("low"), metadata.get("high"), metadata.get("choices")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"recipe key {where!r} must be a finite number, not {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise InputError(f"recipe key {where!r} is {value!r}; it must be {bounds}")
    if choices and value not in choices:
        raise InputError(f"recipe key {where!r} is {value!r}{did_you_mean(str(value), choices)}")
    return value


def _check_model_keys(table: dict[str, Any], model: ModelRecipe) -> None:
    """Refuse sizes that something else in the recipe decides, since they would be passed over in silence."""
    given = table.get("model", {})
    decides = "base" if model.base else "preset" if model.preset else None
    keys = ("n_layer", "n_embd", "n_head", "n_positions") + (("preset", "vocab_size") if decides == "base" else ())
    sizes = [key for key in keys if given.get(key, "") not in ("", 0)]
    if decides and sizes:
        raise InputError(
            f"recipe key 'model.{decides}' is {getattr(model, decides)!r}, which decides model.{sizes[0]} too; "
            "give one of the two"
        )
    tokenizer = next(iter(table.get("tokenizer", {})), "")
    if model.base and tokenizer:
        raise InputError(
            f"recipe key 'tokenizer.{tokenizer}' has no use with model.base {model.base!r}, which brings its own "
            "tokenizer; leave it out"
        )


def _check_consistency(recipe: Recipe) -> None:
    if not _NAME.fullmatch(recipe.name):
        raise InputError(f"recipe key 'name' is {recipe.name!r}; use letters, digits, dots, dashes, underscores")
    corpus, model, training = recipe.corpus, recipe.model, recipe.training
    check_encoding(corpus.encoding, "recipe key 'corpus.encoding'")
    if corpus.transform:
        check_transform(corpus.transform)
    if 0 < corpus.max_characters < recipe.min_characters:
        raise InputError(
            f"recipe key 'corpus.max_characters' is {corpus.max_characters}, less than "
            f"corpus.min_characters {recipe.min_characters}; raise the one or lower the other"
        )
    if corpus.balance != "none" and not corpus.label_field:
        raise InputError(
            f"recipe key 'corpus.balance' is {corpus.balance!r} and there are no labels; "
            "name their field in corpus.label_field"
        )
    if (corpus.balance == "cap") != (corpus.label_cap > 0):
        raise InputError(
            f"recipe key 'corpus.label_cap' is {corpus.label_cap} with corpus.balance {corpus.balance!r}; "
            "set balance to 'cap' and label_cap to at least 1, or neither"
        )
    if corpus.label_field and not corpus.paths:
        raise InputError("recipe key 'corpus.label_field' is for files, and docstrings have none; set corpus.paths")
    _check_instruction(recipe)
    if training.batch_size % training.accumulation:
        raise InputError(
            f"recipe key 'training.accumulation' is {training.accumulation}, which does not divide "
            f"training.batch_size {training.batch_size}; change one of them"
        )
    if 0 < training.sequence_length < 8:
        raise InputError(
            f"recipe key 'training.sequence_length' is {training.sequence_length}; it must be 0 or from 8 on"
        )
    if training.lora_rank and training.freeze:
        raise InputError("recipe key 'training.freeze' has no use with training.lora_rank, which freezes all; drop one")
    if training.lora_rank and len(set(training.lora_targets)) != max(1, len(training.lora_targets)):
        raise InputError("recipe key 'training.lora_targets' must name at least one matrix, and each only once")
    variants = recipe.export.variants
    if len(set(variants)) != len(variants):
        raise InputError(f"recipe key 'export.variants' names one twice: {', '.join(variants)}; name each only once")
    if model.base:
        return  # The base checkpoint's own geometry is checked when it is read.
    if model.n_embd % model.n_head:
        raise InputError(f"recipe key 'model.n_head' is {model.n_head}, which does not divide n_embd {model.n_embd}")


def _check_instruction(recipe: Recipe) -> None:
    instruction = recipe.instruction
    pair = bool(instruction.prompt_field), bool(instruction.response_field)
    if pair[0] != pair[1]:
        given, missing = ("prompt", "response") if pair[0] else ("response", "prompt")
        raise InputError(
            f"recipe key 'instruction.{given}_field' needs instruction.{missing}_field; set both or neither"
        )
    if instruction.messages_field and pair[0]:
        raise InputError("recipe key 'instruction.messages_field' stands instead of prompt_field; set one of the two")
    if instruction.input_field and not pair[0]:
        raise InputError("recipe key 'instruction.input_field' goes with a prompt; set instruction.prompt_field")
    if instruction.is_set and recipe.corpus.builtin != "docstrings" and not recipe.corpus.paths:
        raise InputError(
            "recipe key 'instruction.prompt_field' needs records, and the Chinese text has none; set corpus.paths"
        )
    if instruction.messages_field and not recipe.corpus.paths:
        raise InputError(
            "recipe key 'instruction.messages_field' is for files, and docstrings have no turns; set corpus.paths"
        )
    Template.of(instruction)
