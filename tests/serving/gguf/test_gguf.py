"""`export --gguf`: the file is read by the gguf package, the weights are the bundle's, the encodings are GGML's."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from serving.bundle import open_bundle
from serving.cli import run
from serving.gguf.encodings import ENCODINGS
from tests.closed_form import byte_tokenizer
from tests.tiny_build import Fails, TinyBuild, contents

KINDS = {kind: gguf.GGMLQuantizationType[kind.upper()] for kind in ENCODINGS}


def export(bundle: Path, path: Path, *more: str) -> gguf.GGUFReader:
    assert run(["export", str(bundle), "--gguf", str(path), *more]) == 0
    return gguf.GGUFReader(path)


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def change(bundle: Path, folder: Path, **files: Callable[[bytes], bytes]) -> Path:
    """A copy of `bundle` in which files, by their names with '_' for '.', are other bytes that the manifest names."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["artifacts"]:
        edit = files.pop(entry["path"].replace(".", "_"), None)
        if edit is not None:
            data = edit((folder / entry["path"]).read_bytes())
            (folder / entry["path"]).write_bytes(data)
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if entry["path"] == "tokenizer.json":
                manifest["tokenizer"]["id"] = f"sha256:{entry['sha256']}"
    edit_manifest = files.pop("manifest", None)
    assert not files
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(edit_manifest(text) if edit_manifest else text)
    return folder


def edited(**keys: Any) -> Callable[[bytes], bytes]:
    """An edit that sets keys of a tokenizer.json; `model` and `added` are keys of its model and first added token."""

    def edit(data: bytes) -> bytes:
        table = json.loads(data)
        table["model"] |= keys.pop("model", {})
        table["added_tokens"][0] |= keys.pop("added", {})
        return json.dumps(table | keys).encode()

    return edit


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoding_has_the_bytes_of_the_gguf_package(kind: str) -> None:
    rows = np.random.default_rng(7).standard_normal((64, 96)).astype(np.float32)
    rows[3] = 0
    rows[4, ::2] = -rows[4, 1::2]
    # Halves between two codes, and the two ends of equal magnitude.
    rows[5] = np.resize(np.array([127, 0.5, -0.5, 1.5, -1.5, 126.5, -126.5, -127], np.float32), 96)
    assert ENCODINGS[kind].encode(rows) == gguf.quants.quantize(rows, KINDS[kind]).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_weights_and_the_geometry_of_the_bundle(built: TinyBuild, tmp_path: Path, kind: str) -> None:
    reader = export(built.bundle, tmp_path / "tiny.gguf", "--outtype", kind)
    model = open_bundle(built.bundle).manifest.model
    assert field(reader, "general.architecture") == "gpt2" and field(reader, "general.name") == "tiny"
    assert (
        field(reader, "general.file_type") == gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")]
    )
    found = {key.removeprefix("gpt2."): field(reader, key) for key in reader.fields if key.startswith("gpt2.")}
    assert found.pop("attention.layer_norm_epsilon") == pytest.approx(model.layer_norm_epsilon)
    assert found == {
        "vocab_size": model.vocab_size,
        "context_length": model.n_positions,
        "embedding_length": model.n_embd,
        "block_count": model.n_layer,
        "feed_forward_length": model.n_inner,
        "attention.head_count": model.n_head,
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.n_layer)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(built.bundle / "model.safetensors")
    for name, weight in weights.items():
        tensor = tensors.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        matrix = weight.ndim == 2 and "wpe" not in name
        assert tensor.tensor_type == (KINDS[kind] if matrix else KINDS["f32"])
        wanted = np.ascontiguousarray(weight.T) if matrix and "wte" not in name else weight
        assert tensor.shape.tolist() == list(wanted.shape[::-1])
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        exact = gguf.quants.dequantize(gguf.quants.quantize(wanted, tensor.tensor_type), tensor.tensor_type)
        np.testing.assert_array_equal(data, exact.reshape(wanted.shape))
    assert not tensors


def test_the_file_has_the_tokenizer(built: TinyBuild, tmp_path: Path) -> None:
    reader = export(built.bundle, tmp_path / "new" / "tiny.gguf")
    model, table = open_bundle(built.bundle).manifest.model, json.loads((built.bundle / "tokenizer.json").read_text())
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert {token: index for index, token in enumerate(tokens)} == table["model"]["vocab"] and len(tokens) == 300
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert [index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [model.eos_token_id]
    assert set(kinds) == {gguf.TokenType.NORMAL, gguf.TokenType.CONTROL}
    merges = (built.bundle / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert field(reader, "tokenizer.ggml.merges") == merges
    assert [field(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre", "bos_token_id", "eos_token_id")] == [
        "gpt2", "gpt-2", model.bos_token_id, model.eos_token_id,
    ]  # fmt: skip
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert "tokenizer.chat_template" not in reader.fields


def test_ids_without_a_token_further_ends_and_a_chat_template_are_written(built: TinyBuild, tmp_path: Path) -> None:
    def shorter(data: bytes) -> bytes:
        table = json.loads(data)
        # The last two ids before the end token; one of the two names that stand for such ids is taken.
        for name in [name for name, index in table["model"]["vocab"].items() if index in (297, 298)]:
            del table["model"]["vocab"][name]
        table["model"]["merges"] = table["model"]["merges"][:-2]
        table["added_tokens"].append({**table["added_tokens"][0], "id": 298, "content": "[PAD297]", "special": False})
        return json.dumps(table).encode()

    folder = change(
        built.bundle,
        tmp_path / "copy",
        tokenizer_json=shorter,
        generation_config_json=lambda _: b'{"eos_token_id": [299, 298]}',
        tokenizer_config_json=lambda data: json.dumps(json.loads(data) | {"chat_template": "{{ x }}"}).encode(),
    )
    reader = export(folder, tmp_path / "tiny.gguf")
    assert field(reader, "tokenizer.ggml.tokens")[297:299] == ["[[PAD297]]", "[PAD297]"]
    assert field(reader, "tokenizer.ggml.token_type")[296:] == [
        1,
        gguf.TokenType.UNUSED,
        gguf.TokenType.USER_DEFINED,
        3,
    ]
    assert field(reader, "tokenizer.ggml.eot_token_id") == 298
    assert field(reader, "tokenizer.chat_template") == "{{ x }}"


def test_the_same_bundle_gives_the_same_file_and_an_older_one_is_replaced(built: TinyBuild, tmp_path: Path) -> None:
    before = contents(built.bundle)
    export(built.bundle, tmp_path / "a.gguf", "--outtype", "q8_0")
    export(built.bundle, tmp_path / "b.gguf")
    export(built.bundle, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert contents(built.bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is not GPT-2's"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "its pre-tokenizer is not GPT-2's"),
        ({"decoder": None}, "its decoder is not ByteLevel"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "its post-processor may add tokens"),
        ({"model": {"type": "WordPiece"}}, "it is not a BPE"),
        ({"model": {"ignore_merges": True}}, "its model sets ignore_merges"),
        ({"model": {"vocab": {"a": 0}}}, "lacks some of the 256 bytes"),
        ({"added": {"lstrip": True}}, "white space or whole words"),
        ({"added": {"id": 300}}, "ids outside the model's 0 to 299"),
        ({"added": {"id": 298}}, "one token under two ids"),
        ({"model": {"vocab": 7}}, "tokenizer.json is not a tokenizer"),
        ({"added_tokens": [7]}, "tokenizer.json is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(
    built: TinyBuild, tmp_path: Path, fails: Fails, edits: dict[str, Any], words: str
) -> None:
    folder = change(built.bundle, tmp_path / "copy", tokenizer_json=edited(**edits))
    fails(["export", str(folder), "--gguf", str(tmp_path / "x.gguf")], 1, words)
    assert not (tmp_path / "x.gguf").exists()


def _header(data: bytes, **keys: Any) -> bytes:
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table["transformer.ln_f.bias"] |= keys
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda data: data[:-4], "has no transformer."),
        (lambda data: b"\xff" * 8 + data[8:], "is not a safetensors file"),
        (lambda data: data[:3], "is not a safetensors file"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "is not a safetensors file"),
        (lambda data: (9).to_bytes(8, "little") + b'{"a": NaN', "model.safetensors"),
        (lambda data: _header(data, dtype="BF16"), "has no transformer.ln_f.bias of float32 [32]"),
        (lambda data: _header(data, shape=[31]), "has no transformer.ln_f.bias of float32 [32]"),
        (lambda data: _header(data, data_offsets=[-128, 0]), "has no transformer.ln_f.bias of float32 [32]"),
        (lambda data: _header(data, data_offsets=7), "has no transformer.ln_f.bias of float32 [32]"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    built: TinyBuild, tmp_path: Path, fails: Fails, edit: Callable[[bytes], bytes], words: str
) -> None:
    folder = change(built.bundle, tmp_path / "copy", model_safetensors=edit)
    fails(["export", str(folder), "--gguf", str(tmp_path / "x.gguf")], 1, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_an_activation_that_llama_cpp_lacks_is_refused(built: TinyBuild, tmp_path: Path, fails: Fails) -> None:
    def relu(data: bytes) -> bytes:
        return data.replace(b'"gelu_new"', b'"relu"')

    folder = change(built.bundle, tmp_path / "copy", manifest=relu)
    fails(["export", str(folder), "--gguf", str(tmp_path / "x.gguf")], 1, "the activation function is 'relu'")


def test_what_the_command_line_gets_wrong_is_one_line(
    built: TinyBuild, real_bundle: Path, tmp_path: Path, fails: Fails
) -> None:
    bundle, path = str(built.bundle), str(tmp_path / "x.gguf")
    fails(["export", bundle], 2, "a GGUF file needs both", "gpt2-bundle export BUNDLE --gguf FILE")
    fails(["export", "--gguf", path], 2, "a GGUF file needs both")
    fails(["export", "--outtype", "f16"], 2, "a GGUF file needs both")
    fails(["export", bundle, "--gguf", path, "--set", "seed=1"], 2, "--set is for the export of a run")
    fails(["export", bundle, "--gguf", path, "--base", "gpt2"], 2, "--base is for the export of a run")
    fails(["export", str(tmp_path / "nothing"), "--gguf", path], 2, "there is no such folder")
    fails(["export", bundle, "--gguf", f"{bundle}/x.gguf"], 2, "a bundle holds the files of its manifest alone")
    fails(["export", bundle, "--gguf", str(tmp_path)], 2, "is a folder", "tiny.gguf")
    narrow = open_bundle(real_bundle).manifest.model.n_embd
    assert narrow % 32
    fails(
        ["export", str(real_bundle), "--gguf", path, "--outtype", "q8_0"], 2, f"has {narrow} and", "choose f32 or f16"
    )
    (tmp_path / "notes.txt").write_text("mine")
    fails(["export", bundle, "--gguf", str(tmp_path / "notes.txt")], 2, "holds something else than GGUF")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("notes.txt", "mine")]
    assert export(real_bundle, tmp_path / "x.gguf", "--outtype", "f16").tensors


def test_a_full_disk_leaves_the_older_file(
    built: TinyBuild, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    export(built.bundle, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.gguf.convert.os.fsync", full)
    fails(["export", str(built.bundle), "--gguf", str(path), "--outtype", "f16"], 1, "No space left on device")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_byte_letters_are_those_of_the_tokenizers_library() -> None:
    from serving.gguf.vocabulary import _byte_letters

    assert _byte_letters() == {token for token in byte_tokenizer().get_vocab() if len(token) == 1}
