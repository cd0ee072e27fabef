"""A document, and documents in a file: one JSON object a line, between the steps of preparation and after them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TextIO

from serving.errors import InputError

# The parts of an instruction document: what its template adds, what was asked, what was answered, the end token after
# an answer that another turn follows, and an answer that was cut short (after which nothing ended).
FRAME, PROMPT, RESPONSE, END, CUT = "frame", "prompt", "response", "end", "cut"
_CONTENT = frozenset({PROMPT, RESPONSE, CUT})


class Segment(NamedTuple):
    """A stretch of an instruction document, and which of the parts above it is."""

    text: str
    part: str


@dataclass(frozen=True)
class Document:
    """One text of the corpus and where it came from; the name holds no part of a path above what the recipe named.

    An instruction document has `segments` too, which joined are its text.
    """

    name: str
    text: str
    label: str = ""
    segments: tuple[Segment, ...] = ()

    @property
    def content(self) -> str:
        """The text without what a template adds, so that two documents are not alike by their template alone."""
        if not self.segments:
            return self.text
        return "\n".join(segment.text for segment in self.segments if segment.part in _CONTENT)

    @property
    def runs(self) -> list[tuple[str, bool]]:
        """The text as (stretch, whether the loss counts it), with adjacent uncounted stretches joined.

        An answer is counted, and so is the end token after it unless the answer is empty.
        """
        if not self.segments:
            return [(self.text, True)]
        counted: list[tuple[str, bool, int]] = []
        for before, segment in zip((Segment("", FRAME), *self.segments), self.segments, strict=False):
            answers = segment.part in (RESPONSE, CUT) or (segment.part == END and bool(before.text))
            counted.append((segment.text, answers, len(counted) if answers else -1))
        groups = groupby(counted, key=lambda run: run[1:])
        return [("".join(text for text, *_ in group), scored) for (scored, _), group in groups]

    @property
    def is_answered(self) -> bool:
        """Whether some answer has text; true of a plain document."""
        return not self.segments or any(segment.text for segment in self.segments if segment.part in (RESPONSE, CUT))

    @property
    def answer_characters(self) -> int:
        """The length of the text without blanks at its ends, of an instruction document that of its answers."""
        if not self.segments:
            return len(self.text.strip())
        return sum(len(segment.text.strip()) for segment in self.segments if segment.part in (RESPONSE, CUT))

    def with_text(self, text: str) -> Document:
        """The same plain document with another text."""
        return replace(self, text=text)

    def with_segments(self, segments: list[Segment]) -> Document:
        """The same document with these segments, and the text that they make."""
        return replace(self, text="".join(segment.text for segment in segments), segments=tuple(segments))

    def with_end(self, text: str) -> Document:
        """The same document with `text` as the end token after each turn's answer."""
        if not any(segment.part == END and segment.text not in ("", text) for segment in self.segments):
            return self
        return self.with_segments(
            [Segment(text, END) if segment.part == END and segment.text else segment for segment in self.segments]
        )

    def mapped(self, step: Callable[[str], tuple[str, bool]]) -> Document:
        """The document after a cleaning step: on its text, or on each prompt and answer by itself.

        The template's part stays as it is, and so does the place where an answer begins. Blanks at a prompt's or an
        answer's ends are stripped, as the template does.
        """
        if not self.segments:
            return self.with_text(step(self.text)[0])
        return self.with_segments(
            [
                Segment(step(segment.text)[0].strip(), segment.part) if segment.part in _CONTENT else segment
                for segment in self.segments
            ]
        )

    def trimmed(self, limit: int, trim: Callable[[str, int], tuple[str, bool]]) -> Document:
        """The document cut to `limit` characters by `trim`, an instruction document after its last answer there."""
        if len(self.text) <= limit:
            return self
        if not self.segments:
            return self.with_text(trim(self.text, limit)[0])
        kept, left = [], limit
        for segment in self.segments:
            if len(segment.text) > left:
                if segment.part in (RESPONSE, CUT):
                    kept.append(Segment(trim(segment.text, left)[0] if left else "", CUT))
                break
            kept.append(segment)
            left -= len(segment.text)
        return self.with_segments(kept or [Segment("", FRAME)]).ended()

    def ended(self) -> Document:
        """An instruction document without what stands after its last answer; any without an answer as it is."""
        segments = list(self.segments)
        while segments and self.is_answered and not (segments[-1].part in (RESPONSE, CUT) and segments[-1].text):
            segments.pop()
        return self if len(segments) == len(self.segments) else self.with_segments(segments)


def write_document(file: TextIO, document: Document) -> None:
    """Append a document to a file opened as UTF-8 with line feeds."""
    record: dict[str, object] = {"name": document.name}
    record |= {"segments": document.segments} if document.segments else {"text": document.text}
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
                    document = Document(record["name"], record.get("text", ""), record.get("label", ""))
                    if "text" not in record:
                        document = document.with_segments([Segment(text, part) for text, part in record["segments"]])
                    yield document
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(
                        f"{path}, line {number}: not a document; run 'gpt2-bundle prepare' again"
                    ) from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such corpus; run 'gpt2-bundle prepare' first") from None
