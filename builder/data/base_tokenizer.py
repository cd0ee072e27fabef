"""The tokenizer of a base checkpoint, read whole: its added tokens, its roles, its chat template.

It is written so that transformers reads it with the ids that training uses: as a GPT2Tokenizer where it is GPT-2's own
kind, else as a PreTrainedTokenizerFast, which takes tokenizer.json as it stands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from builder.data.tokenizer import read_tokenizer_files, vocabulary_size, write_text, write_tokenizer_files
from builder.plain_files import is_plain
from builder.special_tokens import (
    GENERATION_CONFIG,
    RoleResolver,
    SettingsFiles,
    TokenIds,
    add_named_tokens,
    add_special,
    extra_tokens,
    named_roles,
    settings_text,
)
from serving.errors import InputError

# Kept as they are. Anything else in tokenizer_config.json is either resolved into the tokenizer or named when it goes.
_KEPT = ("padding_side", "truncation_side")
_RESOLVED = frozenset(
    (
        *("tokenizer_class", "model_max_length", "added_tokens_decoder", "additional_special_tokens"),
        *("extra_special_tokens", "chat_template", "add_prefix_space", "do_lower_case", "strip_accents"),
        *("tokenize_chinese_chars", "do_basic_tokenize"),
    )
)
# What transformers writes about the folder itself, or what changes neither ids nor text here.
_SILENT = frozenset(
    (
        *("name_or_path", "special_tokens_map_file", "tokenizer_file", "use_fast", "backend", "is_local", "errors"),
        *("local_files_only", "processor_class", "max_len", "trust_remote_code", "model_input_names", "init_inputs"),
        *("full_tokenizer_file", "model_specific_special_tokens", "clean_up_tokenization_spaces"),
    )
)
_SILENT_VALUES: dict[str, Any] = {"errors": "replace", "clean_up_tokenization_spaces": False}
# Settings of a config.json that transformers counts among those of generation.
_GENERATION_KEYS = frozenset(
    (
        *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "num_beams", "temperature"),
        *("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("bad_words_ids", "num_return_sequences", "early_stopping", "diversity_penalty", "num_beam_groups"),
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "remove_invalid_values"),
    )
)


@dataclass(frozen=True)
class BaseTokenizer:
    """A base's tokenizer as it will be used: `ids` of its roles, and `notes`, the lines to tell a person."""

    tokenizer: Tokenizer
    ids: TokenIds
    files: SettingsFiles
    notes: tuple[str, ...]


def read_base_tokenizer(folder: Path, weights: Path, rows: int | None = None, end_token: str = "") -> BaseTokenizer:
    """Read the tokenizer in `folder` of the base whose config.json is in `weights`.

    `rows` is how many the token embedding has, None if that is not known; `end_token` is the recipe's, which decides
    where the files disagree. Raises InputError for a tokenizer that is missing, broken, of another kind, or that
    contradicts itself or the embedding.
    """
    files = SettingsFiles.read(folder, weights)
    _refuse_other_readings(files, folder)
    tokenizer = read_tokenizer_files(folder) or _word_pieces(folder, files)
    if tokenizer is None:
        raise InputError(
            f"{folder}: no tokenizer here; it needs tokenizer.json, vocab.json and merges.txt, or vocab.txt (name a "
            "folder with the whole checkpoint)"
        )
    _check_kind(tokenizer, folder)
    _set_prefix_space(tokenizer, files)
    add_named_tokens(tokenizer, files, folder)
    notes: list[str] = []
    if rows is not None:
        tokenizer, files, notes = _fit(tokenizer, files, folder, rows)
    if (folder / "additional_chat_templates").is_dir():
        notes.append("additional_chat_templates: left out; only the default chat template comes along")
    resolver = RoleResolver(tokenizer, files, folder)
    ids = resolver.token_ids(end_token)
    # transformers makes special whatever has a role in tokenizer_config.json, and so must training.
    for role in _roles(tokenizer, ids, files).values():
        add_special(tokenizer, role)
    return BaseTokenizer(tokenizer, ids, files, (*notes, *dict.fromkeys(resolver.notes), *_left_out(files)))


def write_base_tokenizer(base: BaseTokenizer, n_positions: int, folder: Path) -> None:
    """Write a base's tokenizer, with its chat template and its generation settings, into `folder`."""
    tokenizer, files = base.tokenizer, base.files
    roles = _roles(tokenizer, base.ids, files)
    extras = [content for content in extra_tokens(files) if content not in roles.values()]
    more: dict[str, Any] = {key: files.tokenizer_config[key] for key in _KEPT if key in files.tokenizer_config}
    if extras:
        more["additional_special_tokens"] = extras
    if files.chat_template:
        more["chat_template"] = files.chat_template
    write_tokenizer_files(tokenizer, n_positions, folder, roles, more)
    settings = generation_settings(files) | {"bos_token_id": base.ids.bos, "eos_token_id": base.ids.eos}
    if base.ids.pad is not None:
        settings["pad_token_id"] = base.ids.pad
    write_text(folder / GENERATION_CONFIG, settings_text(settings))


def _roles(tokenizer: Tokenizer, ids: TokenIds, files: SettingsFiles) -> dict[str, str]:
    """Every role's token: those that were resolved, and the others as the files name them."""
    named = named_roles(files)
    roles = {"bos_token": str(tokenizer.id_to_token(ids.bos)), "eos_token": str(tokenizer.id_to_token(ids.eos))}
    roles["unk_token"] = named.pop("unk_token", _unknown(tokenizer) or roles["eos_token"])
    if ids.pad is not None:
        roles["pad_token"] = str(tokenizer.id_to_token(ids.pad))
    return roles | {role: content for role, content in named.items() if role not in roles}


def generation_settings(files: SettingsFiles) -> dict[str, Any]:
    """A base's generation settings but for its token ids: those of generation_config.json, else of config.json."""
    table = files.generation_config or {key: files.config[key] for key in _GENERATION_KEYS if key in files.config}
    dropped = ("_from_model_config", "transformers_version", "eos_token_id", "bos_token_id", "pad_token_id")
    return {key: value for key, value in table.items() if key not in dropped and value is not None}


def _unknown(tokenizer: Tokenizer) -> str | None:
    found: str | None = json.loads(tokenizer.to_str())["model"].get("unk_token")
    return found


def _refuse_other_readings(files: SettingsFiles, folder: Path) -> None:
    """Settings that make transformers read other ids than the tokenizer's files alone say."""
    config = files.tokenizer_config
    path = folder / "tokenizer_config.json"
    if config.get("auto_map"):
        raise InputError(f"{path}: auto_map names code of its own, which is never run; save it as tokenizer.json")
    if config.get("split_special_tokens"):
        raise InputError(f"{path}: split_special_tokens is true; only tokenizers that keep special tokens whole")


def _check_kind(tokenizer: Tokenizer, folder: Path) -> None:
    kind = json.loads(tokenizer.to_str())["model"].get("type")
    wanted = {"BPE": decoders.ByteLevel, "WordPiece": decoders.WordPiece}.get(kind)
    if wanted is None or not isinstance(tokenizer.decoder, wanted):
        raise InputError(
            f"{folder}: its tokenizer ({kind}, {type(tokenizer.decoder).__name__} decoder) is neither a byte-level BPE "
            "nor a WordPiece; name a GPT-2 checkpoint in model.base"
        )


def _set_prefix_space(tokenizer: Tokenizer, files: SettingsFiles) -> None:
    """Take over add_prefix_space of tokenizer_config.json, which a GPT2Tokenizer heeds before tokenizer.json's own."""
    wanted, pattern = files.tokenizer_config.get("add_prefix_space"), tokenizer.pre_tokenizer
    byte_level = isinstance(pattern, pre_tokenizers.ByteLevel)
    if byte_level and files.tokenizer_class == "GPT2Tokenizer" and isinstance(wanted, bool):
        pattern.add_prefix_space = wanted


def _word_pieces(folder: Path, files: SettingsFiles) -> Tokenizer | None:
    """BERT's tokenizer over vocab.txt, a token a line, as transformers builds it; None without that file."""
    path = folder / "vocab.txt"
    if not is_plain(path):
        return None
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            vocab = {line.rstrip("\n").rstrip("\r"): index for index, line in enumerate(lines)}
        unknown = named_roles(files).get("unk_token", "[UNK]")
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100))
    except Exception as error:  # The library raises nothing narrower.
        raise InputError(f"{path}: not a vocabulary of word pieces ({error}); name a whole checkpoint") from None
    if unknown not in vocab:
        raise InputError(f"{path}: has no {unknown}, the token for what it does not know; name a whole checkpoint")
    settings = files.tokenizer_config
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _fit(
    tokenizer: Tokenizer, files: SettingsFiles, folder: Path, rows: int
) -> tuple[Tokenizer, SettingsFiles, list[str]]:
    """The tokenizer without padding tokens that the embedding of `rows` has no row for; refuse any other mismatch."""
    notes: list[str] = []
    size, own = vocabulary_size(tokenizer), max(json.loads(tokenizer.to_str())["model"]["vocab"].values()) + 1
    if size > rows:
        outside = {
            token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if index >= rows
        }
        roles = named_roles(files)
        uses = {role for role, content in roles.items() if content in outside} - {"pad_token"}
        pad = roles.get("pad_token")
        if own > rows or uses or set(outside) - {pad}:
            shown = f"{size:,} entries"
            if own <= rows:
                name, index = min(outside.items(), key=lambda pair: pair[1])
                shown = f"the token {name!r} ({index})"
            raise InputError(
                f"{folder}: its tokenizer has {shown}, but the embedding only {rows:,} rows; resize the embedding "
                "(transformers' resize_token_embeddings), or name a whole checkpoint"
            )
        notes.append(
            f"tokenizer: left out {pad!r} ({outside[str(pad)]}), which the embedding of {rows:,} has no row for"
        )
        return _without(tokenizer, str(pad)), _without_pad(files, str(pad)), notes
    if size < rows and size > own and rows % 64:
        raise InputError(
            f"{folder}: the embedding has {rows:,} rows, but the tokenizer with its {size - own} added tokens has "
            f"{size:,} entries; add the tokens that are missing (added_tokens.json), or name a whole checkpoint"
        )
    if size < rows:
        notes.append(f"tokenizer: {size:,} entries; {rows - size:,} rows of the embedding of {rows:,} have no token")
    return tokenizer, files, notes


def _without(tokenizer: Tokenizer, content: str) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != content]
    return Tokenizer.from_str(json.dumps(state))


def _without_pad(files: SettingsFiles, pad: str) -> SettingsFiles:
    def strip(table: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in table.items() if key != "pad_token"}

    def unpadded(table: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in table.items() if key != "pad_token_id"}

    added = {content: index for content, index in files.added_tokens.items() if content != pad}
    return SettingsFiles(
        strip(files.tokenizer_config),
        strip(files.special_tokens_map),
        added,
        unpadded(files.config),
        unpadded(files.generation_config),
        files.chat_template,
    )


def _left_out(files: SettingsFiles) -> list[str]:
    """A line for each kind of setting that does not come along, and one for what does."""
    notes = []
    unknown = sorted(
        key
        for key, value in files.tokenizer_config.items()
        if not key.endswith("_token")
        and key not in _RESOLVED | set(_KEPT)
        and (key not in _SILENT or value != _SILENT_VALUES.get(key, value))
        and value not in (None, False, "", [], {})
    )
    if unknown:
        notes.append(f"tokenizer_config.json: left out {', '.join(unknown)}")
    kept = sorted(generation_settings(files))
    if kept:
        notes.append(f"generation settings kept for transformers: {', '.join(kept)}")
    if files.config.get("task_specific_params") and not files.generation_config:
        notes.append("config.json: left out task_specific_params")
    if files.chat_template:
        notes.append("chat template: the base's")
    return notes
