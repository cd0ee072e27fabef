"""Tokenizers that transformers saved: read with its ids, written so that it reads them again, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from builder.data.base_tokenizer import BaseTokenizer, read_base_tokenizer, write_base_tokenizer
from builder.data.tokenizer import is_gpt2, load_tokenizer
from builder.special_tokens import END_TOKEN, TokenIds, read_token_ids
from serving.errors import InputError

FOLDER = Path(__file__).parents[2] / "oracles" / "tokenizers"
NAMES = sorted(path.name for path in FOLDER.iterdir())
GPT2_NAMES = [name for name in NAMES if name.startswith(("added", "chatml"))]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the fixture that the test names, to be spoilt."""
    return Path(shutil.copytree(FOLDER / request.param, tmp_path / "base"))


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name / "ids.json").read_text(encoding="utf-8"))
    return found


def change(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` deletes one."""
    table = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def read(folder: Path, rows: int | None = None, end_token: str = "") -> BaseTokenizer:
    return read_base_tokenizer(folder, folder, rows, end_token)


def refused(folder: Path, *words: str, rows: int | None = None) -> None:
    with pytest.raises(InputError) as caught:
        read(folder, rows)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name: str) -> None:
    theirs, ours = recorded(name), read(FOLDER / name)
    for text, ids in zip(theirs["texts"], theirs["ids"], strict=True):
        assert ours.tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    end = theirs["sep_token_id"] if theirs["eos_token_id"] is None else theirs["eos_token_id"]
    assert (ours.ids.eos, ours.ids.pad) == (end, theirs["pad_token_id"])
    assert ours.ids.bos == (2 if name.startswith("bert") else theirs["bos_token_id"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_says_the_same(name: str, tmp_path: Path) -> None:
    base = read(FOLDER / name)
    write_base_tokenizer(base, 64, tmp_path)
    assert read_token_ids(tmp_path) == base.ids
    assert load_tokenizer(tmp_path).to_str() == base.tokenizer.to_str()
    again = read(tmp_path)
    assert again.ids == base.ids and again.files.chat_template == base.files.chat_template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = {role: base.tokenizer.token_to_id(config[role]) for role in ("eos_token", "bos_token", "unk_token")}
    assert (named["eos_token"], named["bos_token"]) == (base.ids.eos, base.ids.bos) and named["unk_token"] is not None
    assert config["tokenizer_class"] == ("GPT2Tokenizer" if name in GPT2_NAMES else "PreTrainedTokenizerFast")
    assert (tmp_path / "vocab.json").exists() == (name in GPT2_NAMES)


@pytest.mark.parametrize("name", GPT2_NAMES)
def test_vocabulary_and_merges_alone_say_the_same_with_the_added_tokens(name: str, tmp_path: Path) -> None:
    base = read(FOLDER / name)
    write_base_tokenizer(base, 64, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    alone = read(tmp_path).tokenizer
    for text in recorded(name)["texts"][:4]:  # The last has a token that takes the blank before it.
        assert alone.encode(text).ids == base.tokenizer.encode(text).ids


@pytest.mark.parametrize(
    "folder", [name for name in NAMES if name.startswith("chatml")], indirect=True, ids=lambda name: name
)
def test_a_chat_model_ends_with_its_own_token(folder: Path, tmp_path: Path) -> None:
    change(folder / "config.json", model_type="gpt2", eos_token_id=269, bos_token_id=268)
    change(folder / "generation_config.json", eos_token_id=269, temperature=0.7, do_sample=True)
    base = read(folder)
    assert base.ids == TokenIds(269, 268)
    assert any("do_sample, temperature" in note for note in base.notes)
    write_base_tokenizer(base, 64, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"temperature": 0.7, "do_sample": True, "bos_token_id": 268, "eos_token_id": 269}


@pytest.mark.parametrize("folder", ["chatml_v5"], indirect=True)
@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("config.json", 268, ["tokenizer_config.json says 269 ('<|im_end|>')", "config.json 268 ('<|endoftext|>')"]),
        ("generation_config.json", [269, 268], ["says 269 ('<|im_end|>')", "generation_config.json 268"]),
        ("generation_config.json", "end", ["eos_token_id in generation_config.json is 'end'"]),
        ("config.json", 5000, ["eos_token_id in config.json is 5000, which is not a token"]),
    ],
)
def test_two_end_tokens_are_refused_by_both_names(folder: Path, file: str, value: Any, words: list[str]) -> None:
    change(folder / file, eos_token_id=value)
    refused(folder, *words)


@pytest.mark.parametrize("folder", ["chatml_v5"], indirect=True)
def test_the_recipe_decides_between_two_end_tokens(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=268, bos_token_id=269)
    base = read(folder, end_token="<|im_end|>")
    assert base.ids == TokenIds(269, 268)
    assert any("not 268 ('<|endoftext|>') in config.json" in note for note in base.notes)
    with pytest.raises(InputError, match=r"'model\.end_token' is '</s>', which is not a token"):
        read(folder, end_token="</s>")


@pytest.mark.parametrize("folder", ["added_v5"], indirect=True)
def test_the_default_of_gpt2config_is_no_statement_about_a_small_tokenizer(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=50256, bos_token_id=50256)
    base = read(folder, rows=50257 + 47)
    assert base.ids.eos == 268
    assert any("config.json: eos_token_id 50256 is not a token of this tokenizer" in note for note in base.notes)


@pytest.mark.parametrize("folder", ["chatml_v5"], indirect=True)
def test_a_token_with_a_role_is_a_special_one(folder: Path) -> None:
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in table["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(table))
    base = read(folder)
    assert base.tokenizer.decode(base.tokenizer.encode("the<|im_end|>").ids) == "the"
    assert base.tokenizer.token_to_id("<|im_end|>") == base.ids.eos == 269


@pytest.mark.parametrize("folder", ["added_v430"], indirect=True)
def test_two_padding_tokens_are_refused(folder: Path) -> None:
    change(folder / "config.json", pad_token_id=268)
    refused(folder, "two ids for pad_token: special_tokens_map.json says 271", "config.json 268")


@pytest.mark.parametrize("folder", ["added_v457"], indirect=True)
def test_an_added_token_with_another_id_is_refused(folder: Path) -> None:
    change(folder / "added_tokens.json", **{"<user>": 300})
    refused(folder, "'<user>' has the id 269, but added_tokens.json says 300")


@pytest.mark.parametrize("folder", ["added_v430"], indirect=True)
def test_an_added_token_whose_id_is_another_tokens_is_refused(folder: Path) -> None:
    change(folder / "added_tokens.json", **{"<user>": 200})
    refused(folder, "added_tokens.json gives '<user>' the id 200, but it is 269 in the tokenizer")
    change(folder / "added_tokens.json", **{"<user>": "200"})
    refused(folder, "the id of '<user>' is '200'; it must be an integer")


def plain_folder(folder: Path, **roles: str) -> Path:
    """A byte-level BPE without `<|endoftext|>`, and its vocabulary and merges alone."""
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    del vocab[END_TOKEN]
    (folder / "vocab.json").write_text(json.dumps(vocab | {"</s>": len(vocab)}))
    if roles:
        (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


@pytest.mark.parametrize("folder", ["added_v430"], indirect=True)
def test_another_end_token_is_accepted(folder: Path, tmp_path: Path) -> None:
    refused(plain_folder(folder), "nothing says which token ends a text", "set model.end_token")
    for source in ({"config.json": {"eos_token_id": 268}}, {"tokenizer_config.json": {"eos_token": "</s>"}}):
        for name, table in source.items():
            change(folder / name, **table)
        base = read(folder, rows=269)
        assert base.ids == TokenIds(268, 268)
        assert base.tokenizer.encode("a</s>").ids == [64, 268]
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("folder", ["added_v5"], indirect=True)
def test_a_padding_token_without_a_row_is_left_out(folder: Path, tmp_path: Path) -> None:
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    table["added_tokens"] = table["added_tokens"][:2]  # The end token and [PAD].
    (folder / "tokenizer.json").write_text(json.dumps(table))
    change(folder / "tokenizer_config.json", extra_special_tokens=...)
    change(folder / "config.json", pad_token_id=269)
    base = read(folder, rows=269)
    assert base.ids == TokenIds(268, 268, None) and base.tokenizer.token_to_id("[PAD]") is None
    assert any("left out '[PAD]' (269), which the embedding of 269 has no row for" in note for note in base.notes)
    write_base_tokenizer(base, 64, tmp_path / "out")
    assert "[PAD]" not in "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("folder", ["added_v5"], indirect=True)
def test_other_tokens_without_a_row_are_refused(folder: Path) -> None:
    refused(folder, "has the token '<user>' (270), but the embedding only 270 rows", rows=270)
    refused(folder, "has 274 entries, but the embedding only 100 rows", rows=100)


@pytest.mark.parametrize("folder", ["added_v430"], indirect=True)
def test_an_embedding_with_rows_for_tokens_that_are_not_there_is_refused(folder: Path) -> None:
    refused(folder, "the embedding has 280 rows, but the tokenizer with its 5 added tokens has 274", rows=280)
    base = read(folder, rows=320)  # As resize_token_embeddings(pad_to_multiple_of=64) makes it.
    assert any("46 rows of the embedding of 320 have no token" in note for note in base.notes)


@pytest.mark.parametrize("folder", ["added_v5"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, ["auto_map names code of its own"]),
        ({"split_special_tokens": True}, ["split_special_tokens is true"]),
        ({"added_tokens_decoder": [1]}, ["added_tokens_decoder is not a table of tokens"]),
        ({"added_tokens_decoder": {"7": {}}}, ["added_tokens_decoder is not a table of tokens"]),
        ({"eos_token": ""}, ["a special token is empty text"]),
    ],
)
def test_settings_that_change_how_a_text_is_read_are_refused(folder: Path, settings: Any, words: list[str]) -> None:
    change(folder / "tokenizer_config.json", **settings)
    refused(folder, *words)


@pytest.mark.parametrize("folder", ["added_v5"], indirect=True)
def test_what_does_not_come_along_is_said(folder: Path) -> None:
    change(folder / "tokenizer_config.json", my_setting=3, errors="strict", padding_side="left")
    change(folder / "config.json", task_specific_params={"text-generation": {"max_length": 50}})
    notes = read(folder).notes
    assert "tokenizer_config.json: left out errors, my_setting" in notes
    assert "config.json: left out task_specific_params" in notes


@pytest.mark.parametrize(
    ("normalizer", "pattern"),
    [
        (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        (
            None,
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(",", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
    ],
)
def test_only_gpt2s_own_kind_is_called_a_gpt2tokenizer(normalizer: Any, pattern: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert is_gpt2(tokenizer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pattern
    assert not is_gpt2(tokenizer)


@pytest.mark.parametrize("folder", ["added_v430"], indirect=True)
def test_a_prefix_space_is_taken_over(folder: Path) -> None:
    change(folder / "tokenizer_config.json", add_prefix_space=True)
    base = read(folder)
    assert not is_gpt2(base.tokenizer)
    assert base.tokenizer.encode("the", add_special_tokens=False).ids == base.tokenizer.encode(" the").ids == [258]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_pipe_is_never_waited_for(tmp_path: Path, name: str) -> None:
    import os

    folder = Path(shutil.copytree(FOLDER / "added_v430", tmp_path / "base"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name}: not a plain file")


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_written_with_the_same_ids(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = recorded(name)
    base = read(FOLDER / name)
    write_base_tokenizer(base, 64, tmp_path)
    change(tmp_path / "config.json", model_type="gpt2")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(loaded) == theirs["size"] and loaded.eos_token_id == base.ids.eos
    for text, ids in zip(theirs["texts"], theirs["ids"], strict=True):
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids, text
