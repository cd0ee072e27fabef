"""A document, and documents in a file: one JSON object a line, between the steps of preparation and after them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from serving.errors import InputError


@dataclass(frozen=True)
class Document:
    """One text of the corpus and where it came from; the name holds no part of a path above what the recipe named."""

    name: str
    text: str
    label: str = ""


def write_document(file: TextIO, document: Document) -> None:
    """Append a document to a file opened as UTF-8 with line feeds."""
    record = {"name": document.name, "text": document.text}
    if document.label:
        record["label"] = document.label
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_file(path: Path) -> Iterator[Document]:
    """Yield the documents of a file that `write_document` wrote; InputError if there is none or it is another's."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    yield Document(record["name"], record["text"], record.get("label", ""))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(
                        f"{path}, line {number}: not a document; run 'gpt2-bundle prepare' again"
                    ) from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such corpus; run 'gpt2-bundle prepare' first") from None
