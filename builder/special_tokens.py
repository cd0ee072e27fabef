"""Which token ends a text, begins one, pads: one answer from the six files of a checkpoint that speak of it.

The files are tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json
and config.json. They are read as transformers 5 reads them; where two of them name different ids for one role, nothing
is guessed. docs/checkpoints.md says for every field whether it is honored, checked or refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from builder.plain_files import is_plain, read_json_if_there
from serving.errors import InputError

END_TOKEN = "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERATION_CONFIG = "generation_config.json"
# GPT2Config's own default for bos and eos, which it writes whatever the tokenizer is.
_DEFAULT_ID = 50256
# What a tokenizer class gives a role that no file names, where the vocabulary has that token.
_CLASS_ROLES = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_TOKEN),
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
}
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class SettingsFiles:
    """The settings of a checkpoint: each file's object, empty where there is no such file."""

    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: Any = None

    @classmethod
    def read(cls, tokenizer: Path, weights: Path) -> SettingsFiles:
        """Read them from the folders of a base's tokenizer and weights. Raises InputError for one that is broken."""
        config = read_json_if_there(tokenizer / "tokenizer_config.json", "a tokenizer's configuration")
        return cls(
            tokenizer_config=config,
            special_tokens_map=read_json_if_there(tokenizer / "special_tokens_map.json", "a map of special tokens"),
            added_tokens=read_json_if_there(tokenizer / "added_tokens.json", "a table of added tokens"),
            config=read_json_if_there(weights / "config.json", "a GPT-2 configuration"),
            generation_config=read_json_if_there(weights / GENERATION_CONFIG, "generation settings"),
            chat_template=_chat_template(tokenizer, config),
        )

    @property
    def tokenizer_class(self) -> str:
        """The class that transformers reads the tokenizer with, without the ending "Fast"."""
        named = self.tokenizer_config.get("tokenizer_class") or self.config.get("tokenizer_class") or "GPT2Tokenizer"
        return str(named).removesuffix("Fast")


@dataclass(frozen=True)
class TokenIds:
    """The ids that generation knows. `pad` is None where the checkpoint has no padding token."""

    eos: int
    bos: int
    pad: int | None = None


def read_token_ids(folder: Path) -> TokenIds:
    """Return the ids that the generation_config.json of a prepared tokenizer or a bundle names.

    Raises InputError for a file that this project did not write.
    """
    settings = read_json_if_there(folder / GENERATION_CONFIG, "generation settings")
    ids = [settings.get(f"{role}_token_id") for role in ("eos", "bos", "pad")]
    if not all(type(each) is int for each in ids[:2]) or (ids[2] is not None and type(ids[2]) is not int):
        raise InputError(
            f"{folder / GENERATION_CONFIG}: eos_token_id and bos_token_id must be integers; prepare it again"
        )
    return TokenIds(ids[0], ids[1], ids[2])  # type: ignore[arg-type]


def add_named_tokens(tokenizer: Tokenizer, files: SettingsFiles, folder: Path) -> None:
    """Add to `tokenizer` every added and special token that the settings name and it lacks, in transformers' order.

    Raises InputError, with both ids, where a file gives a token another id than it gets.
    """
    wanted: dict[str, int] = {}
    for content, index in files.added_tokens.items():
        _note_id(wanted, content, index, folder / "added_tokens.json")
    for index, entry in _decoder_entries(files, folder):
        _note_id(wanted, entry["content"], index, folder / "tokenizer_config.json")
    roles, extras = named_roles(files), extra_tokens(files)
    special = {*roles.values(), *extras}
    decoder = {entry["content"]: entry for _, entry in _decoder_entries(files, folder)}
    for content, index in sorted(wanted.items(), key=lambda pair: pair[1]):
        flags = decoder.get(content) or {"special": content in special, "normalized": content not in special}
        _add(tokenizer, content, flags)
        found = tokenizer.token_to_id(content)
        if found != index:
            source = "tokenizer_config.json" if content in decoder else "added_tokens.json"
            raise InputError(
                f"{folder}: {source} gives {content!r} the id {index}, but it is {found} in the tokenizer; "
                "make the two agree in a copy of the folder"
            )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for content in (*roles.values(), *extras):
        if not content:
            raise InputError(f"{folder}: a special token is empty text; mend tokenizer_config.json in a copy")
        _add(tokenizer, content, _flags(files, content) | {"special": True})
    for content in _class_defaults(files).values():
        if content in vocabulary:
            _add(tokenizer, content, {"special": True})


def named_roles(files: SettingsFiles) -> dict[str, str]:
    """The special tokens that files name by role (eos_token, a role of the checkpoint's own, ...), as transformers
    reads them: special_tokens_map.json counts only without an added_tokens_decoder."""
    roles: dict[str, str] = {}
    for table in _role_tables(files):
        for role, value in table.items():
            if role.endswith("_token") and (content := _content(value)) is not None:
                roles[role] = content
            elif role in ROLES and value is None:
                roles.pop(role, None)
        named = table.get("extra_special_tokens")
        if isinstance(named, dict):
            roles |= {role: content for role, value in named.items() if (content := _content(value)) is not None}
    return roles


def extra_tokens(files: SettingsFiles) -> list[str]:
    """The special tokens without a role, in the order in which they are added."""
    found: list[str] = []
    for table in _role_tables(files):
        for key in _LISTS:
            values = table.get(key)
            for value in values if isinstance(values, list) else []:
                content = _content(value)
                if content is not None and content not in found:
                    found.append(content)
    return found


class RoleResolver:
    """Resolves one checkpoint's roles to ids; `notes` are the lines to tell a person."""

    def __init__(self, tokenizer: Tokenizer, files: SettingsFiles, folder: Path) -> None:
        self.notes: list[str] = []
        self._tokenizer, self._files, self._folder = tokenizer, files, folder

    def token_ids(self, end_token: str = "") -> TokenIds:
        """Return the ids of the roles that generation knows; `end_token` decides where the files disagree.

        Raises InputError for a role with two ids, which names both and their files, and if nothing names an end token.
        """
        eos = self._end(end_token)
        bos = self._agreed("bos", settled=bool(end_token))
        if bos is None:
            bos = self._first_token(self._roles().get("cls_token"))
        pad = self._agreed("pad", settled=bool(end_token))
        return TokenIds(eos, eos if bos is None else bos, pad)

    def _end(self, end_token: str) -> int:
        if end_token:
            found = self._tokenizer.token_to_id(end_token)
            if found is None:
                raise InputError(
                    f"recipe key 'model.end_token' is {end_token!r}, which is not a token of {self._folder}; name one"
                )
            others = {f"{self._shown(index)} in {file}" for index, file in self._statements("eos") if index != found}
            if others:
                self.notes.append(f"model.end_token: {self._shown(found)} ends a text, not {', '.join(sorted(others))}")
            return int(found)
        agreed = self._agreed("eos")
        if agreed is not None:
            return agreed
        roles = self._roles()
        found = self._first_token(roles.get("eos_token"), roles.get("sep_token"), END_TOKEN)
        if found is not None:
            return found
        raise InputError(
            f"{self._folder}: nothing says which token ends a text (no eos_token, no eos_token_id, no {END_TOKEN}); "
            "set model.end_token to one of its tokens"
        )

    def _roles(self) -> dict[str, str]:
        return {**_class_defaults(self._files), **named_roles(self._files)}

    def _first_token(self, *contents: str | None) -> int | None:
        """The id of the first of `contents` that is a token."""
        ids = (self._tokenizer.token_to_id(content) for content in contents if content)
        return next((int(index) for index in ids if index is not None), None)

    def _agreed(self, role: str, settled: bool = False) -> int | None:
        """The one id that all files name, None if none does; with `settled` the tokenizer's where they disagree."""
        found = self._statements(role)
        ids = list(dict.fromkeys(index for index, _ in found))
        if len(ids) < 2:
            return ids[0] if ids else None
        if settled:
            self.notes.append(f"{role}_token: {self._shown(ids[0])}, as {found[0][1]} says")
            return ids[0]
        (first, here), (second, there) = found[0], next(each for each in found if each[0] != ids[0])
        places = f"{here} says {self._shown(first)}, {there} {self._shown(second)}"
        if here == there:
            places = f"{here} says {self._shown(first)} and {self._shown(second)}"
        advice = "set model.end_token to the one that ends a text" if role == "eos" else "make them agree in a copy"
        raise InputError(f"{self._folder}: two ids for {role}_token: {places}; {advice}")

    def _statements(self, role: str) -> list[tuple[int, str]]:
        """What each file says of a role, as (id, file). GPT2Config's default counts only if it is a token."""
        found: list[tuple[int, str]] = []
        content = named_roles(self._files).get(f"{role}_token")
        index = self._tokenizer.token_to_id(content) if content else None
        if index is not None:
            found.append((int(index), self._source(role, str(content))))
        for table, name in ((self._files.generation_config, GENERATION_CONFIG), (self._files.config, "config.json")):
            value = table.get(f"{role}_token_id")
            for index in value if isinstance(value, list) else [] if value is None else [value]:
                if type(index) is not int:
                    raise InputError(f"{self._folder}: {role}_token_id in {name} is {index!r}, not a token id")
                if self._tokenizer.id_to_token(index) is not None:
                    found.append((index, name))
                elif index == _DEFAULT_ID or role == "pad":
                    note = f"{name}: {role}_token_id {index} is not a token of this tokenizer, and was left out"
                    self.notes += [note] if note not in self.notes else []
                else:
                    raise InputError(
                        f"{self._folder}: {role}_token_id in {name} is {index}, which is not a token of its tokenizer; "
                        "mend it in a copy of the folder"
                    )
        return found

    def _source(self, role: str, content: str) -> str:
        """The tokenizer's file that gives a role this token; another one that says otherwise is noted."""
        tables = {"tokenizer_config.json": self._files.tokenizer_config}
        tables["special_tokens_map.json"] = self._files.special_tokens_map
        said = {name: _content(table.get(f"{role}_token")) for name, table in tables.items()}
        source = next(name for name, value in reversed(said.items()) if value == content)
        for name, value in said.items():
            if value not in (None, content):
                self.notes.append(f"{role}_token: {content!r}, as {source} says; {name} says {value!r}")
        return source

    def _shown(self, index: int) -> str:
        return f"{index} ({self._tokenizer.id_to_token(index)!r})"


def _role_tables(files: SettingsFiles) -> list[dict[str, Any]]:
    if "added_tokens_decoder" in files.tokenizer_config:
        return [files.tokenizer_config]
    return [files.tokenizer_config, files.special_tokens_map]


def _class_defaults(files: SettingsFiles) -> dict[str, str]:
    """The roles that the tokenizer's class fills where no file says a word of them."""
    defaults = _CLASS_ROLES.get(files.tokenizer_class, {})
    said = {role for table in _role_tables(files) for role in table}
    return {role: content for role, content in defaults.items() if role not in said}


def _content(value: Any) -> str | None:
    """The text of a token, which stands there as text or as a table of an added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _decoder_entries(files: SettingsFiles, folder: Path) -> list[tuple[int, dict[str, Any]]]:
    table = files.tokenizer_config.get("added_tokens_decoder") or {}
    try:
        entries = [(int(index), dict(entry)) for index, entry in table.items()]
        if not all(isinstance(entry["content"], str) for _, entry in entries):
            raise TypeError("content must be text")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is not a table of tokens ({error})"
        ) from None
    return entries


def _note_id(wanted: dict[str, int], content: str, index: Any, path: Path) -> None:
    if type(index) is not int or index < 0:
        raise InputError(f"{path}: the id of {content!r} is {index!r}; it must be an integer of at least 0")
    other = wanted.setdefault(content, index)
    if other != index:
        raise InputError(
            f"{path}: {content!r} has the id {index}, but added_tokens.json says {other}; make the two agree in a copy"
        )


def _flags(files: SettingsFiles, content: str) -> dict[str, Any]:
    """How a role's token takes what stands around it, if a file says so."""
    for table in _role_tables(files):
        for value in table.values():
            if isinstance(value, dict) and value.get("content") == content:
                return value
    return {}


def _add(tokenizer: Tokenizer, content: str, flags: dict[str, Any]) -> None:
    """Add one token unless the tokenizer has it as an added one, and as a special one where that is wanted."""
    keys = ("lstrip", "rstrip", "single_word", "normalized")
    special = bool(flags.get("special", False))
    there = next((each for each in tokenizer.get_added_tokens_decoder().values() if each.content == content), None)
    if there is not None and (there.special or not special):
        return
    if there is not None:
        flags = {key: getattr(there, key) for key in keys}
    options = {key: bool(flags[key]) for key in keys if key in flags}
    token = AddedToken(content, special=special, **({"normalized": not special} | options))
    add: Callable[[list[AddedToken]], int] = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([token])


def add_special(tokenizer: Tokenizer, content: str) -> None:
    """Make a token of the vocabulary a special one, whose characters in a text stand for it."""
    _add(tokenizer, content, {"special": True})


def _chat_template(folder: Path, config: dict[str, Any]) -> Any:
    """The chat template as transformers takes it: a file of its own before tokenizer_config.json's."""
    path = folder / "chat_template.jinja"
    if is_plain(path):
        try:
            return path.read_text(encoding="utf-8")
        except ValueError:
            raise InputError(f"{path}: not UTF-8 text; mend it or leave it out") from None
    table = read_json_if_there(folder / "chat_template.json", "a chat template")
    return table.get("chat_template") or config.get("chat_template")


def settings_text(settings: dict[str, Any]) -> str:
    """JSON as this project writes settings."""
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
