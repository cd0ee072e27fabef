"""Instruction data: records of prompts and responses, or of chat turns, to documents by a template.

A template is four pieces of text, one a role, each with `{content}` where a turn's text goes, stripped of white space
at its ends; a conversation is its turns' pieces in order. A response's piece ends in its content, and the end token
follows: that is where a model learns to stop. GPT-2 has no tokens for roles, so they are words.

What a model reads in training before a response is, to the letter, what `chat_template` gives for the same turns.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.data.docstrings import read_functions
from builder.data.documents import END, FRAME, PROMPT, RESPONSE, Document, Segment
from builder.data.file_readers import (
    NotTextError,
    Skipped,
    checked_label,
    checked_text,
    json_kind,
    read_values,
    skips,
)
from builder.recipe import CorpusRecipe, InstructionRecipe
from builder.special_tokens import END_TOKEN
from serving.errors import InputError
from serving.support.suggestions import did_you_mean

Turn = tuple[str, str]

# Each response begins after a line end: GPT-2's pattern cuts there whatever follows, so that a prompt has the same
# tokens alone and with its response.
_BUILT_IN = {
    "instruction": {
        "system": "{content}\n\n",
        "user": "### Instruction:\n{content}\n\n",
        "input": "### Input:\n{content}\n\n",
        "tool": "### Tool:\n{content}\n\n",
        "assistant": "### Response:\n{content}",
    },
    "chat": {
        "system": "{content}\n\n",
        "user": "User:\n{content}\n\n",
        "input": "Context:\n{content}\n\n",
        "tool": "Tool:\n{content}\n\n",
        "assistant": "Assistant:\n{content}",
    },
}
# Other names of the roles: OpenAI's, and those of ShareGPT's exports.
_ALIASES = {
    "system": ("developer",),
    "user": ("human",),
    "tool": ("function", "observation"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "model"),
}
_ROLES = {role: role for role in _BUILT_IN["chat"]} | {
    alias: role for role, aliases in _ALIASES.items() for alias in aliases
}
_TURN_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class Template:
    """A piece for each role as (text before the content, text after it)."""

    pieces: dict[str, tuple[str, str]]

    @classmethod
    def of(cls, recipe: InstructionRecipe) -> Template:
        """The recipe's template. Raises InputError for a piece without its content, or with anything else in braces."""
        own = {
            "system": recipe.system_template,
            "user": recipe.user_template,
            "input": recipe.input_template,
            "tool": recipe.tool_template,
            "assistant": recipe.assistant_template,
        }
        pieces = {role: _split(role, own[role] or piece) for role, piece in _BUILT_IN[recipe.template].items()}
        if pieces["assistant"][1]:
            raise InputError(
                "recipe key 'instruction.assistant_template' has text after {content}, where the end token stands; "
                "put what separates turns at the start of the next one's piece"
            )
        return cls(pieces)

    def segments(self, turns: list[Turn]) -> list[Segment]:
        """The conversation without its last end token, which is the document's."""
        segments = []
        for index, (role, content) in enumerate(turns):
            before, after = self.pieces[role]
            answer = role == "assistant"
            found = (
                Segment(before, FRAME),
                Segment(content.strip(), RESPONSE if answer else PROMPT),
                Segment(after, FRAME),
                Segment(END_TOKEN if answer and index < len(turns) - 1 else "", END),
            )
            segments += [segment for segment in found if segment.text or segment.part in (PROMPT, RESPONSE)]
        return segments

    def prompt(self, text: str) -> str:
        """What a model is given to answer one user turn."""
        return "".join(segment.text for segment in self.segments([("user", text), ("assistant", "")]))

    def chat_template(self) -> str:
        """The template in Jinja, as transformers' `apply_chat_template` reads it from tokenizer_config.json."""
        content = (
            "{% set content = message['content'] or '' %}{% if content is not string %}"
            "{% set content = content | map(attribute='text') | join %}{% endif %}"
        )
        names = {role: [role, *_ALIASES.get(role, ())] for role in self.pieces}
        branches = content + "".join(
            f"{{% {'elif' if index else 'if'} message['role'] in {names[role]} %}}{_literal(before)}"
            f"{{{{ content | trim }}}}{'{{ eos_token }}' if role == 'assistant' else _literal(after)}"
            for index, (role, (before, after)) in enumerate(self.pieces.items())
        )
        return (
            f"{{% for message in messages %}}{branches}"
            "{% else %}{{ raise_exception('no role ' + message['role'] + ' in this template') }}{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{_literal(self.pieces['assistant'][0])}{{% endif %}}"
        )


def read_instructions(
    path: Path, corpus: CorpusRecipe, recipe: InstructionRecipe, skipped: Skipped | None = None
) -> Iterator[Document]:
    """Yield each record of a file with fields as a document whose name is its line, record or row number.

    `skipped` counts the records that `corpus.bad_records` leaves out. Raises InputError, with the file and the line or
    row, for records without the fields or with anything but text in them, and for chat turns that are none.
    """
    skipped = Counter() if skipped is None else skipped
    template = Template.of(recipe)
    fields = _fields(recipe)
    if corpus.label_field:
        fields["corpus.label_field"] = corpus.label_field
    for place, where, values in read_values(path, fields, corpus, skipped):
        label = checked_label(values[-1], where, corpus.label_field) if corpus.label_field else ""
        try:
            turns = _turns(values, where, recipe)
        except NotTextError as error:
            if not skips(error, corpus, skipped):
                raise
            continue
        yield Document(place, "", label).with_segments(template.segments(turns) or [Segment("", FRAME)])


def _turns(values: tuple[Any, ...], where: str, recipe: InstructionRecipe) -> list[Turn]:
    if recipe.messages_field:
        return _chat(values[0], f"{where}: field {recipe.messages_field!r}")
    names = [recipe.prompt_field, recipe.response_field, recipe.input_field]
    return _pair(*(_text(value, where, name) for value, name in zip(values, names, strict=False) if name))


def read_function_instructions(recipe: InstructionRecipe) -> Iterator[Document]:
    """Yield the functions of the running Python's standard library, their signatures the prompts.

    The fields are "signature" and "docstring". Raises InputError for any other.
    """
    template = Template.of(recipe)
    for key, field in _fields(recipe).items():
        if field not in ("signature", "docstring"):
            raise InputError(
                f"recipe key '{key}' is {field!r}{did_you_mean(field, ['signature', 'docstring'])}; "
                "or set corpus.paths to records of your own"
            )
    for name, signature, docstring in read_functions():
        record = {"signature": signature, "docstring": docstring}
        turns = _pair(*(record[field] for field in _fields(recipe).values()))
        yield Document(name, "").with_segments(template.segments(turns))


def _fields(recipe: InstructionRecipe) -> dict[str, str]:
    if recipe.messages_field:
        return {"instruction.messages_field": recipe.messages_field}
    fields = {
        "instruction.prompt_field": recipe.prompt_field,
        "instruction.response_field": recipe.response_field,
        "instruction.input_field": recipe.input_field,
    }
    return {key: field for key, field in fields.items() if field}


def _pair(prompt: str, response: str, given: str = "") -> list[Turn]:
    middle = [("input", given)] if given.strip() else []
    return [("user", prompt), *middle, ("assistant", response)]


def _text(value: Any, where: str, field: str) -> str:
    return "" if value is None else checked_text(value, where, field)


def _chat(value: Any, where: str) -> list[Turn]:
    """The turns of a chat; see `InstructionRecipe.messages_field`."""
    if not isinstance(value, list):
        raise InputError(f"{where} is a {json_kind(value)}, not a list of turns; mend the record or leave it out")
    turns = []
    for number, turn in enumerate(value, 1):
        place = f"{where}, turn {number}"
        keys = next((keys for keys in _TURN_KEYS if isinstance(turn, dict) and set(keys) <= turn.keys()), None)
        if keys is None:
            raise InputError(f"{place}: not a turn; write it as {{role, content}} or {{from, value}}")
        role = turn[keys[0]]
        if not isinstance(role, str) or role not in _ROLES:
            known = did_you_mean(str(role), _ROLES)
            raise InputError(f"{place}: role {role!r}{known}; mend the record or leave it out")
        turns.append((_ROLES[role], _content(turn, place, keys[1])))
    return turns


def _content(turn: dict[str, Any], place: str, key: str) -> str:
    """The text of a turn, also where it comes in parts, as OpenAI's API has them."""
    value = turn[key]
    if not value and turn.get("tool_calls"):
        raise NotTextError(
            f"{place}: a call of a tool, not text; mend the record or leave it out", "tool call instead of text"
        )
    if not isinstance(value, list):
        return _text(value, place, key)
    texts = [part.get("text") if isinstance(part, dict) else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise NotTextError(
            f"{place}: {key!r} has a part that is not text; mend the record or leave it out", "part that is not text"
        )
    return "".join(_text(text, place, key) for text in texts)


def _split(role: str, piece: str) -> tuple[str, str]:
    """The text before and after a piece's one `{content}`; doubled braces stand for single ones."""
    where = f"recipe key 'instruction.{role}_template'"
    try:
        parts = list(string.Formatter().parse(piece))
    except ValueError as error:
        raise InputError(f"{where}: {error}; write {{{{ and }}}} for braces that are meant as such") from None
    texts = [""]
    for literal, name, form, conversion in parts:
        texts[-1] += literal
        if name is None:
            continue
        if name != "content" or form or conversion:
            raise InputError(f"{where}: {{{name}}} is not a placeholder; the only one is {{content}}")
        texts.append("")
    if len(texts) != 2:
        raise InputError(f"{where} has {{content}} {len(texts) - 1} times; the turn's text must stand in it once")
    return texts[0], texts[1]


def _literal(text: str) -> str:
    """A Jinja expression that gives `text`, of printable ASCII, so that no setting for white space touches it."""
    if not text:
        return ""
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"{{{{ '{escaped}' }}}}"
