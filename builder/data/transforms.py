"""A function of the user's own that each text goes through before it is cleaned, such as a word segmenter."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from builder.data.cleaning import Cleaned
from serving.errors import InputError

_KEY = "recipe key 'corpus.transform'"


def check_transform(name: str, key: str = _KEY) -> None:
    """Raise InputError for a name that is not written as FILE.py:FUNCTION or MODULE:FUNCTION."""
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise InputError(f"{key} is {name!r}; write it as FILE.py:FUNCTION or MODULE:FUNCTION")


def transform_hash(name: str) -> str:
    """Return the SHA-256 of the source that holds a transform, which is read again when it changes.

    What that source imports is not followed. Raises InputError if there is no such file or module.
    """
    return hashlib.sha256(_source(name).read_bytes()).hexdigest()


def load_transform(name: str, key: str = _KEY) -> Callable[[str], Cleaned]:
    """Return a transform as a cleaning step. Its file or module is imported, once a process.

    `key` is where the name was given, for errors. Raises InputError if it cannot be imported or has no such function.
    The step raises InputError for whatever the function raises, and for a result that is not text.
    """
    function = _load(name, key)

    def step(text: str) -> Cleaned:
        try:
            result = function(text)
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split()) or "no message"
            shown = repr(text[:40]) + ("..." if len(text) > 40 else "")
            raise InputError(f"{key}: {name} raised {type(error).__name__} ({said}) on the text {shown}") from None
        if not isinstance(result, str):
            raise InputError(f"{key}: {name} returned a {type(result).__name__}; it must return the text as a string")
        return result, result != text

    return step


def _source(name: str, key: str = _KEY) -> Path:
    check_transform(name, key)
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise InputError(f"{key}: no file {path}; it is looked for from the folder that the command runs in")
        return path
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise InputError(f"{key}: no module {place!r} is installed; install it, or name a file as FILE.py:FUNCTION")
    return Path(spec.origin)


@functools.cache
def _load(name: str, key: str) -> Callable[[str], object]:
    path, (place, _, attribute) = _source(name, key), name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"gpt2_bundle_transform_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split()) or "no message"
        raise InputError(f"{key}: {path} cannot be imported: {type(error).__name__} ({said})") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"{key}: {path} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]
