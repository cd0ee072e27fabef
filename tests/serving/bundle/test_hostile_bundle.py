"""Bundles that somebody tampered with: one line of our own, and no file outside of the folder is opened."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import MANIFEST_NAME, open_bundle, to_json
from serving.engine.config import EngineConfig, estimate_memory
from serving.errors import GPT2BundleError
from serving.sampling.detokenizer import load_tokenizer
from tests.closed_form import write_bundle
from tests.tiny_build import Fails

MUTANTS = 510
HUGE: list[Any] = [2**31 - 1, 2**31, 2**63, 10**400, -(10**30), 1e308, -1e-308, 0.1]
TYPES: list[Any] = [None, True, False, 0, -1, "", "x", [], {}, [[]], {"a": {}}, [None], "\0", "\ud800", "é" * 3000]
NAMES = [
    "../secret",
    "ort/../../secret",
    "/etc/passwd",
    "~/secret",
    "..\\secret",
    "C:\\secret",
    "//host/share",
    "tokenizer.json\0",
    "\0",
    ".",
    "..",
    "",
    "ort//fp32",
    "file:///etc/passwd",
    "con",
    "a\nb",
    "a" * 5000,
    "%2e%2e/secret",
]
_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The path of every file that Python opens meanwhile."""
    global _opened
    sys.addaudithook(_audit)  # It cannot be taken away again; without the list it does nothing.
    _opened = []
    yield _opened
    _opened = None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def at(table: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        table = table[key]
    return table


def replaced(source: random.Random, text: str, values: list[Any], wanted: type = object) -> bytes:
    """Up to three values are others; only texts, numbers and so on if `wanted` says so."""
    table = json.loads(text)
    for _ in range(source.randint(1, 3)):
        found = [path for path in places(table)[1:] if isinstance(at(table, path), wanted)]
        if found:
            *parent, key = source.choice(found)
            at(table, tuple(parent))[key] = copy.deepcopy(source.choice(values))
    return json.dumps(table).encode()


def bytes_changed(source: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(source.randint(1, 8)):
        place = source.randrange(len(data))
        match source.randrange(3):
            case 0:
                data[place] ^= 1 << source.randrange(8)
            case 1:
                del data[place : place + source.randint(1, 200)]
            case _:
                data[place:place] = source.choice([b"\0", b"{", b"]", b'"', b"\\u0000", b"\xff\xfe", b"9" * 5000])
    return bytes(data)


def keys_doubled_or_moved(source: random.Random, text: str) -> bytes:
    table = json.loads(text)
    tables = [path for path in places(table) if isinstance(at(table, path), dict) and at(table, path)]
    inner = at(table, source.choice(tables))
    key = source.choice(list(inner))
    match source.randrange(3):
        case 0:
            line = f'"{key}": '
            return text.replace(
                line, f"{line}null, {line}" if source.random() < 0.5 else f"{line}0,\n{line}", 1
            ).encode()
        case 1:
            inner[source.choice([*NAMES, key.upper(), f"{key} "])] = inner.pop(key)
        case _:
            other = at(table, source.choice(tables))
            other[key] = copy.deepcopy(inner[key])
    return json.dumps(table).encode()


def nested(source: random.Random, text: str) -> bytes:
    depth, kind = source.choice([10, 63, 64, 65, 1000, 100_000]), source.choice(["[]", "{}"])
    inner = "[" * depth + "]" * depth if kind == "[]" else '{"a":' * depth + "0" + "}" * depth
    return text.replace('"parity": {', f'"parity": {{"x": {inner}, ', 1).replace(", }", "}").encode()


MANIFESTS: list[Callable[[random.Random, str], bytes]] = [
    bytes_changed,
    lambda source, text: replaced(source, text, TYPES),
    lambda source, text: replaced(source, text, HUGE, int),
    lambda source, text: replaced(source, text, NAMES, str),
    keys_doubled_or_moved,
    nested,
]


def use(folder: Path) -> None:
    """Everything that is done with a bundle before its graphs are run. Raises GPT2BundleError and nothing else."""
    bundle = open_bundle(folder)
    load_tokenizer(bundle)
    to_json(bundle.manifest)
    for name, graph in bundle.manifest.graphs.items():
        bundle.path(graph.path).stat()
        if graph.cache == "shared-buffer":
            estimate_memory(bundle, name, EngineConfig())


def check(folder: Path, opened: list[str]) -> bool:
    """Whether the bundle is refused; opened files and error are looked at."""
    opened.clear()
    refused = False
    try:
        use(folder)
    except GPT2BundleError as error:
        refused = True
        assert "\n" not in str(error) and "\0" not in str(error) and len(str(error)) < 10_000, repr(str(error))
    outside = [path for path in opened if not path.endswith((".py", ".pyc")) and not Path(path).is_relative_to(folder)]
    assert not outside, outside
    assert not any("\0" in path or ".." in Path(path).parts for path in opened), opened
    return refused


def test_no_manifest_leads_astray(tmp_path: Path, opened: list[str]) -> None:
    folder, source = tmp_path / "tiny", random.Random(2026)
    write_bundle(folder)
    (tmp_path / "secret").write_text("not yours")
    manifest = folder / MANIFEST_NAME
    text = manifest.read_text()
    assert not check(folder, opened)
    refused = 0
    for number in range(MUTANTS):
        data = MANIFESTS[number % len(MANIFESTS)](source, text)
        manifest.write_bytes(data)
        try:
            refused += check(folder, opened)
        except Exception as error:
            raise AssertionError(f"mutant {number}: {data[:3000]!r}") from error
    assert refused > MUTANTS / 2, "the mutations do little"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 4}, "caches for 2 blocks"),
        ({"n_head": 1}, "past_key_values.0.key of shape"),
        ({"n_embd": 3 * 2**20}, "past_key_values.0.key of shape"),
        ({"vocab_size": 2**31 - 1}, "logits of shape"),
        ({"vocab_size": 100, "eos_token_id": 1, "bos_token_id": 1}, "logits of shape"),
    ],
)
def test_a_model_that_is_not_the_graphs_is_refused(
    real_bundle: Path, tmp_path: Path, fails: Fails, changes: dict[str, int], words: str
) -> None:
    folder = tmp_path / "bytes"
    shutil.copytree(real_bundle, folder)
    table = json.loads((folder / MANIFEST_NAME).read_text())
    table["model"].update(changes)
    (folder / MANIFEST_NAME).write_text(json.dumps(table))
    fails(["generate", str(folder), "a", "--max-new-tokens", "2"], 1, words, "build the bundle again")


def links(folder: Path, secret: Path) -> dict[str, Callable[[], None]]:
    """Ways to have something else where a file of the bundle was."""
    file, inner = folder / "tokenizer.json", folder / "ort"

    def become(path: Path, target: Path) -> None:
        whole = secret / path.name
        path.rename(whole)
        path.symlink_to(whole if target is secret else target)

    def pipe() -> None:
        file.unlink()
        os.mkfifo(file)

    def folder_for_file() -> None:
        file.unlink()
        file.mkdir()

    return {
        "a file is a link to the same bytes elsewhere": lambda: become(file, secret),
        "a folder is a link": lambda: become(inner, secret),
        "the manifest is a link": lambda: become(folder / MANIFEST_NAME, secret),
        "a file is a link to itself": lambda: become(file, file),
        "a file is a link to a device": lambda: become(file, Path("/dev/zero")),
        "a file is a pipe": pipe,
        "a file is a folder": folder_for_file,
        "a link beside": lambda: (folder / "more").symlink_to(secret),
        "a file beside": lambda: (folder / "..more").write_text(""),
        "a name that is no text": lambda: Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_text("") and None,
    }


@pytest.mark.parametrize("number", range(10))
def test_no_link_or_pipe_is_followed(tmp_path: Path, opened: list[str], number: int) -> None:
    folder, secret = tmp_path / "tiny", tmp_path / "elsewhere"
    write_bundle(folder)
    secret.mkdir()
    ways = list(links(folder, secret).items())
    assert len(ways) == 10
    name, change = ways[number]
    change()
    assert check(folder, opened), name
