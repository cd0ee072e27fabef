"""`gpt2-bundle generate` through the command line, with the closed form in the place of a runtime."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from serving.backends import loader
from serving.bundle import Bundle, open_bundle
from serving.cli import run
from serving.errors import InputError, RuntimeMissingError
from tests.closed_form import END, ClosedFormBackend, byte_tokenizer, chat_files, greedy, write_bundle
from tests.tiny_build import Fails

TOKENIZER = byte_tokenizer()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Replace the loader; the list fills with what was asked for."""
    calls: list[tuple[str, str | None]] = []

    def load(bundle: Bundle, runtime: str, graph: str | None, *rest: object) -> ClosedFormBackend:
        calls.append((runtime, graph))
        return ClosedFormBackend()

    monkeypatch.setattr(loader, "load_backend", load)
    return calls


def continuation(prompt: list[int], count: int) -> str:
    return TOKENIZER.decode(greedy(prompt, count, 257), skip_special_tokens=True)


def test_text_and_json_agree(
    bundle_folder: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", str(bundle_folder), "hi", "--max-new-tokens", "20", "--ignore-eos"]
    ids = TOKENIZER.encode("hi").ids
    assert run(common) == 0
    assert capsys.readouterr().out == continuation(ids, 20) + "\n"
    assert run([*common, "--json", "--graph", "ort/fp32"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    table = json.loads(line)
    assert table["token_ids"] == greedy(ids, 20, 257)
    assert table["text"] == continuation(ids, 20)
    assert table["finish_reason"] == "length" and table["runtime"] == "onnx" and table["prompt_tokens"] == 2
    assert table["tokens_per_second"] > 0
    assert asked == [("onnx", None), ("onnx", "ort/fp32")]


def test_a_chat_is_rendered_and_ends_at_its_turns_end(
    tmp_path: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
    write_bundle(tmp_path / "chat", extra=chat_files(template))
    command = ["generate", str(tmp_path / "chat"), "hi", "--chat", "--system", "Be.", "--max-new-tokens", "9", "--json"]
    assert run(command) == 0
    table = json.loads(capsys.readouterr().out)
    prompt = TOKENIZER.encode(f"<system>Be.{END}<user>hi{END}<assistant>").ids
    assert table["token_ids"] == greedy(prompt, 9, 257) and table["prompt_tokens"] == len(prompt)


def test_a_chat_takes_a_template(
    bundle_folder: Path, tmp_path: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(bundle_folder), "hi", "--chat"]) == 2
    assert "no chat template; leave --chat out" in capsys.readouterr().err
    assert run(["generate", str(bundle_folder), "hi", "--system", "x"]) == 2
    assert "give --chat too" in capsys.readouterr().err
    write_bundle(tmp_path / "chat", extra=chat_files("{{ raise_exception('no\x1b[31m talk') }}"))
    assert run(["generate", str(tmp_path / "chat"), "hi", "--chat"]) == 2
    said = capsys.readouterr().err
    assert "refuses these messages: no" in said and "\x1b" not in said and len(said.splitlines()) == 1


def test_stop_strings_end_it(
    bundle_folder: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = continuation(TOKENIZER.encode("hi").ids, 20)
    stop = next(each for each in text[3:] if each != "\ufffd")
    arguments = ["generate", str(bundle_folder), "hi", "--stop", "never", "--stop", stop, "--ignore-eos", "--json"]
    assert run(arguments) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["finish_reason"] == "stop"
    assert table["text"] == text[: text.index(stop)]


@pytest.mark.parametrize("option", ["--stop", "--stop-token-id"])
def test_a_special_token_ends_it_by_text_and_any_token_by_id(
    bundle_folder: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    # The end token comes by itself, and is no end where it is ignored.
    prompt = next(text for text in map(chr, range(32, 127)) if 256 in greedy(TOKENIZER.encode(text).ids, 60, 257)[:-1])
    ids = greedy(TOKENIZER.encode(prompt).ids, 60, 257)
    place = ids.index(256)
    value = {"--stop": "<|endoftext|>", "--stop-token-id": "256"}[option]
    common = ["generate", str(bundle_folder), prompt, "--max-new-tokens", "60", "--ignore-eos", "--json"]
    assert run([*common, option, value]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["token_ids"], table["finish_reason"]) == (ids[: place + 1], "stop")
    assert table["text"] == TOKENIZER.decode(ids[:place])
    if option == "--stop-token-id":
        assert run([*common, option, "300"]) == 2
        assert "stop_token_ids of prompt 0 has the token id 300, outside" in capsys.readouterr().err


def test_prompts_from_standard_input_and_empty_ones(
    bundle_folder: Path,
    asked: list[tuple[str, str | None]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(data: bytes) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = run(["generate", str(bundle_folder), "-", "--max-new-tokens", "4", "--ignore-eos", "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.err

    assert read("é\n\n".encode())[1]["token_ids"] == greedy(TOKENIZER.encode("é\n").ids, 4, 257)
    assert read(b"")[1]["token_ids"] == greedy([256], 4, 257)
    code, line = read(b"\xff\xfe")
    assert code == 2 and "not valid UTF-8" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "nan"], 2, "temperature is nan"),
        (["--top-p", "0"], 2, "top_p is 0"),
        (["--top-k", "-1"], 2, "top_k is -1"),
        (["--seed", "-2"], 2, "seed is -2"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--stop", ""], 2, "stop has ''"),
        (["--min-p", "1.5"], 2, "min_p is 1.5"),
        (["--repetition-penalty", "0"], 2, "repetition_penalty is 0"),
        (["--presence-penalty", "3"], 2, "presence_penalty is 3"),
        (["--frequency-penalty", "nan"], 2, "frequency_penalty is nan"),
        (["--logit-bias", "7"], 2, "--logit-bias is '7'; write ID=VALUE"),
        (["--logit-bias", "7=101"], 2, "logit_bias is ((7, 101.0),)"),
    ],
)
def test_mistakes_are_one_line(
    bundle_folder: Path,
    asked: list[tuple[str, str | None]],
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["generate", str(bundle_folder), "hi", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == "" and asked == []


def test_bias_and_penalties_reach_the_choice(
    bundle_folder: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    def ids(*options: str) -> list[int]:
        arguments = ["generate", str(bundle_folder), "hi", "--max-new-tokens", "2", "--ignore-eos", "--json"]
        assert run([*arguments, *options]) == 0
        return list(json.loads(capsys.readouterr().out)["token_ids"])

    first = greedy(TOKENIZER.encode("hi").ids, 1, 257)[0]
    assert ids()[0] == first
    assert ids("--logit-bias", f"{first}=-100")[0] == (first + 1) % 257
    assert ids("--logit-bias", "5=100", "--logit-bias", "6=99", "--presence-penalty", "1.5") == [5, 6]
    assert run(["generate", str(bundle_folder), "hi", "--logit-bias", "257=1"]) == 2
    assert "the logit_bias of prompt 0 has the token id 257, outside" in capsys.readouterr().err


def test_long_prompts_and_broken_tokenizers(
    bundle_folder: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(bundle_folder), "x" * 64]) == 2
    assert "64 tokens, which leaves no room in a context of 64" in capsys.readouterr().err
    tokenizer = bundle_folder / "tokenizer.json"
    tokenizer.write_bytes(b"{" + b" " * (tokenizer.stat().st_size - 1))
    assert run(["generate", str(bundle_folder), "x"]) == 1
    assert "tokenizer.json' has changed" in capsys.readouterr().err


def test_text_that_the_terminal_cannot_show(
    bundle_folder: Path, asked: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert run(["generate", str(bundle_folder), "hi", "--ignore-eos"]) == 0
    assert b"?" in terminal.getvalue()


class Fake:
    """Takes the place of a runtime's class and remembers its arguments."""

    def __init__(self, bundle: Bundle, **options: object) -> None:
        self.options = options


def test_loader_asks_for_what_the_graph_needs(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(bundle_folder)
    for module, name in (
        ("serving.backends.onnx", "OnnxBackend"),
        ("serving.backends.tensorflow", "TensorFlowBackend"),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: Fake}))
    options: Any = loader.load_backend(bundle, "onnx")
    assert options.options == {}
    options = loader.load_backend(bundle, "onnx", "ort/fp32")
    assert options.options == {"graph_name": "ort/fp32"}
    options = loader.load_backend(bundle, "tensorflow", "savedmodel/serving_default")
    assert options.options == {}
    for runtime, graph, message in [
        ("onx", None, "no runtime 'onx'; did you mean 'onnx'"),
        ("onnx", "ort/fp64", "no graph 'ort/fp64'; did you mean 'ort/fp32'"),
        ("onnx", "savedmodel/serving_default", "--runtime tensorflow"),
    ]:
        with pytest.raises(InputError, match=message):
            loader.load_backend(bundle, runtime, graph)
    options = loader.load_backend(bundle, "onnx", None, "cuda")
    assert options.options == {"device": "cuda"}
    options = loader.load_backend(bundle, "onnx", threads=3)
    assert options.options == {"threads": 3}
    options = loader.load_backend(bundle, "onnx", speculation="on")
    assert options.options == {"speculation": True}
    options = loader.load_backend(bundle, "onnx", speculation="off")
    assert options.options == {}
    with pytest.raises(InputError, match="speculation is 'fast'"):
        loader.load_backend(bundle, "onnx", speculation="fast")
    options = loader.load_backend(bundle, "tensorflow", speculation="auto")
    assert options.options == {}
    for runtime, device, message in [("onnx", "cud", "did you mean 'cuda'"), ("tensorflow", "cuda", "--runtime onnx")]:
        with pytest.raises(InputError, match=message):
            loader.load_backend(bundle, runtime, None, device)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module", name="onnxruntime"), r"'onnxruntime', .*pip install 'gpt2-bundle\[onnx\]'"),
        (ImportError("libcudnn.so.9: cannot open"), "installed but does not load"),
    ],
)
def test_a_runtime_that_is_not_there(
    bundle_folder: Path, error: ImportError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(bundle: Bundle) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "serving.backends.onnx", types.SimpleNamespace(OnnxBackend=missing))
    with pytest.raises(RuntimeMissingError, match=message):
        loader.load_backend(open_bundle(bundle_folder), "onnx")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--regex", "[a-f]{3}-[0-9]{2}"], "[a-f]{3}-[0-9]{2}"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
        (["--json-schema", '{"type": "integer", "minimum": 10, "maximum": 20}'], "1[0-9]|20"),
    ],
)
def test_a_text_of_a_given_form(
    bundle_folder: Path,
    asked: list[tuple[str, str | None]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    pattern: str,
) -> None:
    common = ["generate", str(bundle_folder), "hi", "--temperature", "1", *options]
    for seed in range(4):
        assert run([*common, "--seed", str(seed), "--json"]) == 0
        table = json.loads(capsys.readouterr().out)
        assert re.fullmatch(pattern, table["text"]) and table["finish_reason"] == "stop"
    assert run([*common, "--seed", "3"]) == 0
    assert capsys.readouterr().out == table["text"] + "\n"
    assert run([*common, "--json", "--max-new-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "length"


def test_a_schema_in_a_file(
    bundle_folder: Path, tmp_path: Path, asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["é", "ö"]}', encoding="utf-8")
    assert run(["generate", str(bundle_folder), "hi", "--json-schema", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) in ("é", "ö")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--regex", "a", "--choice", "b"], ["--regex and --choice", "leave one out"]),
        (["--regex", "(["], ["--regex", "regex parse error"]),
        (["--json-schema", "no/such/file"], ["--json-schema", "no/such/file", "No such file"]),
        (["--json-schema", '{"type": "banana"}'], ["--json-schema", "banana"]),
        (["--choice", ""], ["--choice", "empty"]),
    ],
)
def test_a_form_that_makes_no_sense_is_one_line(
    bundle_folder: Path, asked: list[tuple[str, str | None]], fails: Fails, options: list[str], words: list[str]
) -> None:
    fails(["generate", str(bundle_folder), "hi", *options], 2, *words)


def test_a_form_without_its_library_says_what_to_install(
    bundle_folder: Path, asked: list[tuple[str, str | None]], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fails(["generate", str(bundle_folder), "hi", "--regex", "a"], 1, "pip install 'gpt2-bundle[guided]'")
