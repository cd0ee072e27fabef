"""The parts of a recipe that decide which text is read, what becomes of it, and its tokenizer; see `builder.recipe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def key(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field with its sentence and its inclusive bounds."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CorpusRecipe:
    """Where the text comes from and how it is split."""

    paths: tuple[str, ...] = key((), "Files, folders or globs to read. Empty reads the builtin text.")
    builtin: str = key(
        "docstrings",
        "Text to read without paths: the docstrings of the running Python, or generated Chinese sentences.",
        choices=("docstrings", "chinese"),
    )
    document: str = key(
        "file", "What one document is in .txt and .md files: the whole file, or each line.", choices=("file", "line")
    )
    encoding: str = key(
        "utf-8",
        "Encoding of files without a byte-order mark, such as gb18030 or cp1252. A byte-order mark takes precedence.",
    )
    transform: str = key(
        "",
        "Function that each text passes through before cleaning, as FILE.py:FUNCTION or MODULE:FUNCTION. It "
        "maps text to text.",
    )
    text_field: str = key(
        "text", "Field of a .json or .jsonl record, or column of a table, that holds the text. a.b is the field b in a."
    )
    bad_records: str = key(
        "skip",
        "What to do with records that hold null or a number instead of text: skip and count them, or stop "
        "with an error.",
        choices=("skip", "error"),
    )
    label_field: str = key("", "Field or column that holds the label of a document. Empty reads no labels.")
    balance: str = key(
        "none",
        "Label balancing of the training side: cap each label at label_cap, sample down to the rarest, or up "
        "to the most frequent.",
        choices=("none", "cap", "down", "up"),
    )
    label_cap: int = key(0, 'Maximum number of documents per label with balance = "cap". 0 means no limit.', low=0)
    validation_fraction: float = key(
        0.05,
        "Share of the text to hold out: documents selected by hash, or the ends of long ones where that "
        "misses the share.",
        low=0.001,
        high=0.5,
    )
    deduplicate: bool = key(True, "Drop documents that repeat an earlier text, regardless of white space.")
    near_duplicates: bool = key(False, "Drop documents that are similar to an earlier one, by MinHash.")
    near_threshold: float = key(
        0.8, "Jaccard similarity of shingles from which two documents count as near-duplicates.", low=0.3, high=1.0
    )
    near_num_perm: int = key(
        128, "Permutations of a MinHash signature. More permutations estimate the similarity better.", low=16, high=1024
    )
    near_shingle_words: int = key(5, "Words per shingle.", low=1, high=50)
    min_characters: int = key(
        0,
        "Drop shorter documents, by their text or by their responses alone. 0 means 20, or 1 for instructions "
        "and for one document per line.",
        low=0,
    )
    max_characters: int = key(0, "Drop longer documents, or cut them with trim. 0 means no limit.", low=0)
    max_tokens: int = key(
        0,
        "Drop documents of more tokens, or cut them with trim. The end token does not count. 0 means no limit.",
        low=0,
    )
    trim: bool = key(
        False, "Cut documents that are too long at the end of a line, a sentence or a word, instead of dropping them."
    )


@dataclass(frozen=True)
class InstructionRecipe:
    """Prompts and responses instead of plain text: where they stand in a record, and the template around them."""

    prompt_field: str = key("", "Field or column that holds the prompt. Requires response_field.")
    response_field: str = key("", "Field or column that holds the response. The loss counts the response alone.")
    input_field: str = key(
        "", "Field or column with additional input for the prompt, such as a context. It may be empty in a record."
    )
    messages_field: str = key(
        "",
        "Field with a list of chat turns, {role, content} or ShareGPT's {from, value}. Replaces the three "
        "fields above.",
    )
    template: str = key(
        "instruction",
        'Template around prompts and responses: "### " headings as in Alpaca, or names of the roles. The keys '
        "below replace parts of it.",
        choices=("instruction", "chat"),
    )
    system_template: str = key("", "Template of a system turn, with {content} in it. Empty uses the one of template.")
    user_template: str = key(
        "", "Template of a user turn or a prompt, with {content} in it. Empty uses the one of template."
    )
    input_template: str = key(
        "", "Template of the text in input_field, with {content} in it. Empty uses the one of template."
    )
    tool_template: str = key("", "Template of a tool's result, with {content} in it. Empty uses the one of template.")
    assistant_template: str = key(
        "",
        "Template of a response. It must end in {content}, because the end token follows. Empty uses the one "
        "of template.",
    )

    @property
    def is_set(self) -> bool:
        """Whether records are read as instructions."""
        return bool(self.prompt_field or self.response_field or self.messages_field)


@dataclass(frozen=True)
class CleaningRecipe:
    """What is done to each document's text before anything else; all off unless switched on, in the order they run."""

    html: bool = key(False, "Remove HTML tags, scripts and styles, and decode entities.")
    invisible: bool = key(False, "Remove control characters, terminal escape sequences and zero-width characters.")
    unicode: str = key("none", "Unicode normalization form.", choices=("none", "NFC", "NFKC"))
    symbols: str = key(
        "keep",
        "Runs of four or more equal symbols, and of box-drawing characters: keep, shorten (collapse) or "
        "remove (drop) them.",
        choices=("keep", "collapse", "drop"),
    )
    boilerplate_documents: int = key(
        0, "Remove lines that occur in at least this many documents, such as license headers. 0 keeps all.", low=0
    )
    boilerplate_characters: int = key(20, "Minimum length of a boilerplate line, in characters.", low=1)
    white_space: str = key(
        "keep",
        "lines: unify line ends, remove blanks at line ends and repeated empty lines. words: also collapse "
        "blanks within lines.",
        choices=("keep", "lines", "words"),
    )


@dataclass(frozen=True)
class TokenizerRecipe:
    """The byte-level BPE trained on the corpus; a base checkpoint brings its own instead."""

    vocab_size: int = key(2048, "Vocabulary size, with the 256 bytes and the end token.", low=257, high=1_000_000)
    min_frequency: int = key(2, "Minimum number of occurrences of a pair before it is merged.", low=1)
    unbroken_characters: int = key(
        1_500_000,
        "Characters of scripts without spaces, such as Chinese, to train on, sampled evenly from the text. "
        "Each takes about 250 bytes of memory.",
        low=1000,
    )
