"""The errors that a person can cause, each ending in one line on the terminal.

Every error of this project that is not a bug derives from `GPT2BundleError`. Its message is one sentence that says
what is wrong, where, and what to do; `exit_code` is what the command line leaves with.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAX_MESSAGE = 500
"""Characters of an error's line."""


def cut(text: str, most: int = 80) -> str:
    """Text that came from elsewhere, as an error shows it: its first `most` characters, no half of a surrogate pair."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return text.encode("utf-8", "replace").decode("utf-8")


def one_line(error: BaseException) -> str:
    """The message of `error` in one line of at most MAX_MESSAGE characters, control characters written out."""
    return printable(cut(" ".join(str(error)[: 8 * MAX_MESSAGE].split()), MAX_MESSAGE))


def printable(text: str) -> str:
    """`text` with control characters, which may be orders to a terminal, written out; but for tabs and new lines."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class GPT2BundleError(Exception):
    """Something failed for a reason that a user can understand and mend. Exit code 1."""

    exit_code = 1


class InputError(GPT2BundleError):
    """What the caller named or passed is wrong: a path, a recipe key, a value. Exit code 2."""

    exit_code = 2


class BundleError(GPT2BundleError):
    """A folder that is not a whole, unchanged bundle of a schema that this version reads."""


class ParityError(GPT2BundleError):
    """Two runtimes disagree by more than the tolerance, so nothing may be published."""


class TrainingError(GPT2BundleError):
    """Training cannot continue: not-a-number losses, too little text, a checkpoint of another model."""


class RuntimeMissingError(GPT2BundleError):
    """A runtime that was asked for by name is not installed here."""


class ServerError(GPT2BundleError):
    """A server refused a request, or did not answer; `code` is the status by gRPC's name, such as NOT_FOUND."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
