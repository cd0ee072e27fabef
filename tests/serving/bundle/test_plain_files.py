"""Names that are no plain files, files without end and files that change: one line, in bounded time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import MANIFEST_NAME, open_bundle
from serving.bundle.folder import Bundle
from serving.bundle.plain_files import hash_plain, open_plain, read_plain
from serving.entrypoints import version_sources
from serving.errors import BundleError, one_line
from serving.sampling.detokenizer import load_tokenizer

MEMORY = 2_500_000
"""KiB of address space of a process that is attacked."""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


def folder(path: Path) -> None:
    path.mkdir()


HOSTILE: list[Callable[[Path], None]] = [pipe, device, sparse, folder]


@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize("name", [MANIFEST_NAME, "tokenizer.json"])
def test_what_is_no_plain_file_is_refused(bundle_folder: Path, make: Callable[[Path], None], name: str) -> None:
    bundle = open_bundle(bundle_folder)
    (bundle_folder / name).unlink()
    make(bundle_folder / name)
    with pytest.raises(BundleError, match=r"not a plain file|symbolic link|bytes|is missing"):
        open_bundle(bundle_folder)
    if name != MANIFEST_NAME:
        with pytest.raises(BundleError):
            bundle.read(name)
    else:
        (candidate,) = version_sources.find(bundle_folder)
        assert candidate == version_sources.find(bundle_folder)[0]


@pytest.mark.parametrize("make", HOSTILE)
def test_serve_says_so_in_one_line(bundle_folder: Path, make: Callable[[Path], None]) -> None:
    (bundle_folder / MANIFEST_NAME).unlink()
    make(bundle_folder / MANIFEST_NAME)
    code = f"import serving.cli; raise SystemExit(serving.cli.run(['serve', {str(bundle_folder)!r}, '--port', '0']))"
    result = subprocess.run(
        ["bash", "-c", f'ulimit -v {MEMORY}; exec {sys.executable} -c "$0"', code],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode in (1, 2)
    assert len(result.stderr.splitlines()) == 1 and "manifest" in result.stderr and len(result.stderr) < 600


def test_a_file_that_grows_or_is_cut_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345"
    assert hash_plain(path, 5)[0] == 5
    with pytest.raises(BundleError, match="more than 4 bytes"):
        read_plain(path, 4)
    with open_plain(path) as file:
        assert file.read() == b"12345"
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "none")


def test_what_is_read_is_what_was_hashed(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    path = bundle_folder / "tokenizer.json"
    before = path.read_bytes()
    assert bundle.read("tokenizer.json") == before
    path.write_bytes(before.replace(b"1", b"2", 1))
    with pytest.raises(BundleError, match="has changed"):
        load_tokenizer(bundle)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Bundle:
    """The bundle, its tokenizer changed and its manifest written anew for it."""
    import hashlib

    table = json.loads((folder / "tokenizer.json").read_text())
    change(table)
    data = json.dumps(table).encode()
    (folder / "tokenizer.json").write_bytes(data)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    digest = hashlib.sha256(data).hexdigest()
    for artifact in manifest["artifacts"]:
        if artifact["path"] == "tokenizer.json":
            artifact["sha256"], artifact["size"] = digest, len(data)
    manifest["tokenizer"]["id"] = f"sha256:{digest}"
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return open_bundle(folder)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
PADDING = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a", "pad_to_multiple_of": None}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
TOKENIZERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "replacements": lambda table: table.update(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 40}),
    "many steps": lambda table: table.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99999}),
    "pattern": lambda table: table.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT]}),
    "unknown": lambda table: table.update(normalizer={"type": "x" * 100_000}),
    "no type": lambda table: table.update(normalizer=[[]]),
    "no model": lambda table: table.update(model=None),
    "wrong model": lambda table: table["model"].update(vocab=3),
    "merges": lambda table: table["model"].update(merges=[["a" * 1_000_000, "b"]]),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_hostile_tokenizers_are_refused_in_one_line(
    bundle_folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    bundle = rewritten(bundle_folder, change)
    with pytest.raises(BundleError) as caught:
        load_tokenizer(bundle)
    assert "tokenizer.json" in str(caught.value) and len(str(caught.value)) < 600
    assert len(one_line(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'d)?|\p{N}{1,3}",
    ],
)
def test_patterns_that_published_tokenizers_split_at_are_run(bundle_folder: Path, pattern: str) -> None:
    split = {**SPLIT, "pattern": {"Regex": pattern}}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    rules = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    assert load_tokenizer(rewritten(bundle_folder, lambda table: table.update(pre_tokenizer=rules))).encode("abc").ids


@pytest.mark.parametrize(
    "pattern", ["(a|aa)+$", "(a*)*b", r"(?=(\w+))\1:", "((a|b)*c*)*", "x" * 2000, "(", "(?:a+){20}"]
)
def test_patterns_that_may_take_exponential_time_are_refused(bundle_folder: Path, pattern: str) -> None:
    split = {**SPLIT, "pattern": {"Regex": pattern}}
    with pytest.raises(BundleError, match="pre_tokenizer of the type Split"):
        load_tokenizer(rewritten(bundle_folder, lambda table: table.update(pre_tokenizer=split)))


def test_a_replacement_may_not_make_a_text_longer(bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="makes a text longer"):
        load_tokenizer(rewritten(bundle_folder, lambda table: table.update(normalizer=REPLACE)))
    same = {**REPLACE, "content": "b"}
    assert load_tokenizer(rewritten(bundle_folder, lambda table: table.update(normalizer=same))).encode("a").ids


def test_padding_and_truncation_are_left_out(bundle_folder: Path) -> None:
    def change(table: dict[str, Any]) -> None:
        table["padding"] = {**PADDING, "strategy": {"Fixed": 300_000_000}}
        table["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}

    assert len(load_tokenizer(rewritten(bundle_folder, change)).encode("abc").ids) == 3


def test_a_panic_of_the_library_is_one_line(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(text: str) -> None:
        raise PanicException("called `Result::unwrap()`\n" * 1000)

    bundle = open_bundle(bundle_folder)
    monkeypatch.setattr("serving.sampling.detokenizer.Tokenizer", type("Double", (), {"from_str": staticmethod(panic)}))
    with pytest.raises(BundleError, match="not a tokenizer"):
        load_tokenizer(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["artifacts"].extend(table["artifacts"][:1] * 120_000),
        lambda table: table.update({"x" * 10_000_000: 1}),
        lambda table: table["quality"].update({"x" * 10_000_000: 1.0}),
        lambda table: table["quality"].update({str(index): 1.0 for index in range(200_000)}),
        lambda table: table.update(name="x" * 10_000_000),
        lambda table: table.update({f"k{index}": 1 for index in range(300_000)}),
    ],
    ids=["artifacts", "key", "inner key", "keys", "name", "unknown"],
)
def test_huge_manifests_are_refused_in_a_short_line(
    bundle_folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = bundle_folder / MANIFEST_NAME
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle_folder)
    assert len(str(caught.value)) < 600
