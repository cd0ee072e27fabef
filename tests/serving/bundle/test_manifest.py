"""The manifest's schema: what it refuses, and by which name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.bundle import from_json, to_json
from serving.bundle.strict_json import MAX_BYTES, loads
from serving.errors import BundleError
from tests.closed_form import geometry, write_bundle

RELAXED = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of a small bundle."""
    return to_json(write_bundle(tmp_path_factory.mktemp("bundle")))


def edited(text: str, edit: Callable[[Any], object]) -> str:
    table = json.loads(text)
    edit(table)
    return json.dumps(table)


def put(path: str, value: object) -> Callable[[Any], None]:
    """An edit that sets the place `path`, its keys separated by '|'."""

    def edit(table: Any) -> None:
        *keys, last = path.split("|")
        for key in keys:
            table = table[int(key) if isinstance(table, list) else key]
        table[int(last) if isinstance(table, list) else last] = value

    return edit


def test_parameters_of_the_published_gpt2_sizes() -> None:
    sizes = {(768, 12, 12): 124_439_808, (1600, 48, 25): 1_557_611_200}
    for (embd, layers, heads), count in sizes.items():
        changes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": embd, "n_layer": layers, "n_head": heads}
        assert type(geometry())(**{**vars(geometry()), **changes, "n_inner": 4 * embd}).parameters == count


REFUSED = [
    (put("model|n_embed", 8), r"unknown key model\.n_embed; did you mean 'n_embd'"),
    (put("artefacts", []), "unknown key artefacts; did you mean 'artifacts'"),
    (put("artifacts|0|mode", 1), r"unknown key artifacts\[0\]\.mode"),
    (put("graphs|ort/fp32|inputs|input_ids|type", 1), r"graphs\['ort/fp32'\]\.inputs\.input_ids\.type"),
    (put("provenance|host", "x"), r"unknown key provenance\.host"),
    (put("tokenizer|kind", "x"), r"unknown key tokenizer\.kind"),
    (lambda table: table.pop("quality"), "the key quality is missing"),
    (lambda table: table["model"].pop("n_layer"), r"the key model\.n_layer is missing"),
    (lambda table: table.pop("schema_version"), "the key schema_version is missing"),
    (put("schema_version", 2), "schema_version is 2 but this version of gpt2-bundle reads 1"),
    (put("schema_version", True), "schema_version is True"),
    (put("schema_version", 1.0), "schema_version is 1.0"),
    (put("model|n_layer", True), r"model\.n_layer is true or false but must be an integer"),
    (put("model|n_layer", 2.0), r"model\.n_layer is a number but must be an integer"),
    (put("model|n_layer", 0), r"model\.n_layer is 0"),
    (put("model|n_layer", "2"), r"model\.n_layer is text"),
    (put("model|n_head", 3), "does not divide"),
    (put("model|eos_token_id", 257), r"model\.eos_token_id is 257"),
    (put("model|activation_function", "swish"), "must be one of 'gelu_new', 'gelu', 'relu'"),
    (put("model|layer_norm_epsilon", 0), r"model\.layer_norm_epsilon is 0"),
    (put("model", []), "model is a list but must be a table"),
    (put("name", "../tiny"), "name is"),
    (put("name", ""), "name is"),
    (put("name", "tiny\n"), "name is"),
    (put("created", "yesterday"), "created is"),
    (put("created", "2025-13-31T12:00:00Z"), "created is"),
    (put("created", "2025-01-31T12:00:00+01:00"), "created is"),
    (put("artifacts|0|size", -1), r"artifacts\[0\]\.size is -1"),
    (put("artifacts|0|sha256", "AB" * 32), r"artifacts\[0\]\.sha256"),
    (put("artifacts|0|sha256", "ab"), r"artifacts\[0\]\.sha256"),
    (put("artifacts|0|path", "/etc/passwd"), r"artifacts\[0\]\.path is '/etc/passwd'"),
    (put("artifacts|0|path", "../x"), r"artifacts\[0\]\.path is '\.\./x'"),
    (put("artifacts|0|path", "a/../x"), r"artifacts\[0\]\.path"),
    (put("artifacts|0|path", "a\\x"), r"artifacts\[0\]\.path"),
    (put("artifacts|0|path", "C:/x"), r"artifacts\[0\]\.path"),
    (put("artifacts|0|path", "a//x"), r"artifacts\[0\]\.path"),
    (put("artifacts|0|path", "a\x00"), r"artifacts\[0\]\.path"),
    (put("artifacts|0|path", "a" * 2000), r"artifacts\[0\]\.path"),
    (put("artifacts|0|path", "Manifest.JSON"), "cannot hold its own hash"),
    (put("artifacts|1|path", "README.md"), "names 'README.md' twice"),
    (put("artifacts|1|path", "readme.md"), "differ only in case"),
    (put("artifacts", {}), "artifacts is a table but must be a list"),
    (put("graphs|ort/fp32|path", "ort/fp32/other.onnx"), r"graphs\['ort/fp32'\]\.path .* is not an artifact"),
    (put("graphs|ort/fp32|precision", "fp64"), r"graphs\['ort/fp32'\]\.precision"),
    (put("graphs|ort/fp32|runtime", "tensorflow"), r"graphs\['ort/fp32'\]\.signature"),
    (put("graphs|savedmodel/serving_default|signature", ""), r"signature must be given"),
    (put("graphs|ort/fp32|inputs", {}), r"graphs\['ort/fp32'\]\.inputs"),
    (put("graphs|ort/fp32|outputs|logits|shape", [1.5]), r"outputs\.logits\.shape\[0\] is a number"),
    (put("graphs|ort/fp32|outputs|logits|shape", [-1]), r"outputs\.logits\.shape"),
    (put("graphs|ort/fp32|outputs|logits|dtype", "float"), r"outputs\.logits\.dtype"),
    (put("graphs|fp32", None), r"graphs\.fp32 is null"),
    (lambda table: table["graphs"].update(fp32=table["graphs"].pop("ort/fp32")), "FOLDER/VARIANT"),
    (put("tokenizer|id", "sha256:" + "0" * 64), "not the hash of the artifact 'tokenizer.json'"),
    (put("tokenizer|id", "0" * 64), r"tokenizer\.id"),
    (put("tokenizer|files", ["tokenizer.json", "vocab.json"]), "tokenizer file 'vocab.json' is not an artifact"),
    (put("tokenizer|files", []), r"tokenizer\.files does not name"),
    (put("quality|loss", "low"), r"quality\.loss is text but must be a number"),
    (put("quality|loss", 10**400), r"quality\.loss is too large"),
    (put("provenance|versions|keras", 3), r"provenance\.versions\.keras is an integer but must be text"),
    (put("provenance|seed", -1), r"provenance\.seed"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_manifest_refusals_name_the_place(text: str, edit: Callable[[Any], object], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        from_json(edited(text, edit), "dist/x/manifest.json")
    assert str(caught.value).startswith("dist/x/manifest.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "not valid UTF-8"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1, "b": {"a": 1, "c": 2, "a": 3}}', "the key 'a' occurs twice"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper"),
        (b" " * (MAX_BYTES + 1), "larger than the limit"),
        (b"[]", "must be a table"),
        (b"null", "must be a table"),
    ],
)
def test_documents_that_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        from_json(data)


def test_brackets_in_text_are_not_nesting() -> None:
    assert loads(b'["' + b"[" * 500 + b'\\"["]', "x") == ["[" * 500 + '"[']
    began = time.monotonic()
    with pytest.raises(BundleError):
        loads(b'["' + b'\\"' * 2_000_000, "x")
    assert time.monotonic() - began < 5


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@RELAXED
@given(st.data())
def test_random_edits_give_bundle_errors_only(text: str, data: st.DataObject) -> None:
    table = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(table)[1:] or [()]))
        if not path:
            break
        parent = table
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            del parent[path[-1]]
        else:
            parent[path[-1]] = data.draw(VALUES)
    try:
        manifest = from_json(json.dumps(table))
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert from_json(to_json(manifest)) == manifest


@RELAXED
@given(st.data())
def test_random_bytes_in_the_manifest_give_bundle_errors_only(text: str, data: st.DataObject) -> None:
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        from_json(bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 3]))]))
    except BundleError as error:
        assert "\n" not in str(error)
