"""One build from text to published bundle, and which of its stages run again after what has changed."""

from __future__ import annotations

import json
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from builder.data.token_shards import open_tokens
from builder.progress import Reporter
from builder.recipe_reader import read_recipe
from builder.stages.pipeline import build
from builder.stages.run_keys import Run
from serving.bundle import Bundle, open_bundle
from serving.cli import run
from tests.tiny_build import TinyBuild, write_corpus

PROMPT = "Return the value"


def done(out: str) -> list[str]:
    """The stages that a command said it did not run again."""
    return [line.split("] ")[1].partition(":")[0] for line in out.splitlines() if line.endswith(": done already")]


@pytest.fixture(scope="module")
def bundle(built: TinyBuild) -> Bundle:
    return open_bundle(built.bundle)


# What a build leaves behind.


def test_the_bundle_has_what_the_format_asks_for(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.name == "tiny" and manifest.model.n_positions == 48 and manifest.model.vocab_size == 300
    texts = ("generate_text", "tokenize", "detokenize")
    slots = ("prefill_slots", "decode_slots", "release_slots", "cancel_slots")
    assert set(manifest.graphs) == {"onnx/portable", "ort/fp32", "ort/int8", "ort/int4", "ort/choose"} | {
        f"savedmodel/{name}" for name in ("serving_default", "prefill", "decode", "score", *texts, *slots)
    }
    for name in ("README.md", "config.json", "generation_config.json", "golden.json", "verification.json"):
        assert bundle.path(name).stat().st_size > 0
    assert manifest.quality["validation_perplexity"] > 1 and manifest.quality["trigram_perplexity"] > 1
    parity = manifest.parity
    # Its 94 tokens of text prove nothing of the gates.
    assert parity["verified"] is False and parity["status"] == "too few tokens"
    assert parity["greedy_equal"] == parity["greedy_tokens"] == 24
    assert set(parity["max_abs"]) == {"ort/fp32", "onnx/portable", "savedmodel"}
    assert 0 <= max(parity["max_abs"].values()) < 1e-4 and parity["perplexity_relative"] < 1e-4
    assert manifest.provenance.recipe["training"]["epochs"] == 0.1
    assert {"python", "tensorflow", "keras", "onnxruntime"} <= set(manifest.provenance.versions)


def test_the_golden_record_holds_the_held_out_text_and_what_is_expected_of_it(bundle: Bundle, built: TinyBuild) -> None:
    golden = json.loads(bundle.path("golden.json").read_text())
    held_out = open_tokens(built.run / "prepare" / "tokens" / "validation.bin").tolist()
    assert golden["text"] == held_out[:96]
    assert len(golden["prompts"]) == len(golden["expected"]) == 4
    assert all(len(tokens) == golden["new_tokens"] == 6 for tokens in golden["expected"])
    assert len({len(prompt) for prompt in golden["prompts"]}) > 1, "the prompts are not ragged"
    text = " ".join(map(str, held_out))
    assert all(" ".join(map(str, prompt)) in text for prompt in golden["prompts"])
    assert golden["tolerances"] == {"max_abs": 1e-3, "perplexity_relative": 1e-4}


def test_the_certificate_says_what_was_compared(bundle: Bundle) -> None:
    certificate = json.loads(bundle.path("verification.json").read_text())
    assert certificate["passed"] is True and certificate["schema_version"] == 1
    statuses = [certificate["status"], *(table["status"] for table in certificate["variants"].values())]
    assert statuses == ["too few tokens"] * 3
    assert any("perplexities were compared on 94 tokens" in sentence for sentence in certificate["limits"])
    assert any("training took 6" in sentence for sentence in certificate["limits"])
    for table in certificate["variants"].values():
        low, high = table["perplexity_relative_interval"]
        assert low < table["perplexity_relative"] < high
    for table in certificate["runtimes"].values():
        assert {name: table[name]["rows"] for name in ("every_step", "prefill", "first_decode", "last_position")} == {
            "every_step": 24, "prefill": 4, "first_decode": 4, "last_position": 4,
        }  # fmt: skip
        assert table["perplexity"] == pytest.approx(certificate["perplexity"]["reference"], rel=1e-4)
    assert len(certificate["greedy"]) == 6
    # A model of few steps is nearly flat, so that without top-k few choices are certain.
    assert len(certificate["choices"]) == 4
    for name, record in certificate["choices"].items():
        assert record["draws"] == 24 and 1 <= record["exact"] == record["equal"]
        assert record["exact"] >= 23 or name in ("all tokens", "min-p and penalties")
    assert any("tensorflow_model_server" in sentence for sentence in certificate["not_run"])


def test_the_card_is_what_was_measured(bundle: Bundle) -> None:
    card = bundle.path("README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| this model | {bundle.manifest.quality['validation_perplexity']:.2f} |" in card
    assert card.count("| 24 of 24 |") == 3 and "base_model" not in card
    assert "Status: too few tokens." in card and card.count("| too few tokens |") == 2
    assert "Trained from scratch: 6 steps of 4 x 32 tokens with muon" in card and "Too few steps: " in card
    assert card.endswith("\n")


def test_the_commands_of_the_card_run_in_the_folder_of_the_bundle(
    tiny: TinyBuild, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.bundle)
    card = Path("README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in card.split("```sh\n")[1].split("```")[0].splitlines()]
    assert [command[:2] for command in commands] == [["gpt2-bundle", each] for each in ("generate", "serve", "verify")]
    assert all(command[2] == "." for command in commands)
    capsys.readouterr()
    assert run(commands[0][1:]) == 0 and capsys.readouterr().out.endswith("\n")


def test_the_configuration_is_hugging_faces(bundle: Bundle) -> None:
    config = json.loads(bundle.path("config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert (config["n_embd"], config["n_layer"], config["n_head"], config["n_positions"]) == (32, 2, 2, 48)
    # transformers takes 0.1 where they are not named, and KerasHub reads no folder without resid_pdrop.
    assert [config[f"{name}_pdrop"] for name in ("embd", "attn", "resid")] == [0.0, 0.0, 0.0]
    assert config["vocab_size"] == 300 and config["eos_token_id"] == bundle.manifest.model.eos_token_id
    generation = json.loads(bundle.path("generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_every_format_has_the_same_weights(bundle: Bundle) -> None:
    """The ONNX graphs read the very bytes of model.safetensors, each from its own folder."""
    names = ("model.safetensors", "onnx/model.onnx_data", "ort/fp32/model.onnx_data")
    assert len({bundle.path(name).read_bytes() for name in names}) == 1
    # onnx refuses external data that has a second hard link.
    assert {bundle.path(name).stat().st_nlink for name in names} == {1}
    with bundle.path("model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert "transformer.wte.weight" in header and header["transformer.wte.weight"]["shape"] == [300, 32]


def test_the_weights_are_the_trained_ones(bundle: Bundle, built: TinyBuild) -> None:
    assert bundle.path("model.safetensors").read_bytes() == (built.run / "train" / "model.safetensors").read_bytes()


def test_only_the_recipe_says_where_the_bundle_was_built(bundle: Bundle, built: TinyBuild) -> None:
    place = str(built.corpus.parent).encode()
    found = [item.path for item in bundle.manifest.artifacts if place in bundle.path(item.path).read_bytes()]
    assert found == []
    assert str(Path.cwd()).encode() not in b"".join(bundle.path(a.path).read_bytes() for a in bundle.manifest.artifacts)


def test_every_user_may_read_the_bundle(bundle: Bundle) -> None:
    for item in bundle.manifest.artifacts:
        assert bundle.path(item.path).stat().st_mode & 0o044 == 0o044, item.path


# What the commands say about it.


@pytest.mark.parametrize(
    "sampling", [["--temperature", "0"], ["--temperature", "1", "--seed", "5"], ["--top-k", "9", "--top-p", "0.9"]]
)
def test_both_runtimes_write_the_same_text(
    built: TinyBuild, capfd: pytest.CaptureFixture[str], sampling: list[str]
) -> None:
    common = [*sampling, "--max-new-tokens", "12", "--ignore-eos", "--json"]
    answers = []
    for runtime in (["onnx"], ["onnx", "--graph", "onnx/portable"], ["tensorflow"]):
        assert run(["generate", str(built.bundle), PROMPT, "--runtime", *runtime, *common]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        answers.append(json.loads(out.splitlines()[-1]))
    assert [answer["token_ids"] for answer in answers] == [answers[0]["token_ids"]] * 3
    assert len(answers[0]["token_ids"]) == 12 and len({answer["text"] for answer in answers}) == 1


def test_inspect_finds_it_whole(built: TinyBuild, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(built.bundle)]) == 0
    assert "every SHA-256 matches" in capsys.readouterr().out
    assert run(["inspect", str(built.bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 36608


@pytest.mark.slow
def test_verify_repeats_the_certificate_of_a_bundle_and_writes_nothing(
    built: TinyBuild, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.dist.rglob("*")}
    assert run(["verify", str(built.bundle), "--json"]) == 0
    out, err = capfd.readouterr()
    again, first = json.loads(out.splitlines()[-1]), json.loads((built.bundle / "verification.json").read_text())
    assert err == "" and again["greedy"] == first["greedy"] and again["passed"] is True
    assert {path: path.stat().st_mtime_ns for path in built.dist.rglob("*")} == before


# What runs again.


def test_the_same_build_again_is_a_look_at_the_hashes(tiny: TinyBuild) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.bundle.rglob("*")}
    code = (
        "import sys; from serving.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(code or (3 if {'tensorflow', 'onnx', 'onnxruntime'} & set(sys.modules) else 0))"
    )
    result = subprocess.run([sys.executable, "-c", code, *tiny.build()], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "is this recipe's bundle already, and whole" in result.stdout
    lines = result.stdout.splitlines()[-5:]
    names = ["data report", "training report", "certificate", "model card"]
    assert [line.partition(": ")[0] for line in lines] == [*names, "try it"]
    assert all(Path(line.partition(": ")[2]).is_file() for line in lines[:4])
    assert {path: path.stat().st_mtime_ns for path in tiny.bundle.rglob("*")} == before


@pytest.mark.slow
def test_another_tolerance_exports_anew_but_does_not_train(tiny: TinyBuild, capfd: pytest.CaptureFixture[str]) -> None:
    trained = (tiny.run / "train" / "training.json").stat().st_mtime_ns
    assert run([*tiny.build("verify.max_abs=5e-4"), "--json"]) == 0
    out, err = capfd.readouterr()
    assert done(out) == ["prepare", "train"] and "exported savedmodel/1" in out and err == ""
    assert json.loads(out.splitlines()[-1])["bundle"] == str(tiny.bundle)
    assert json.loads((tiny.bundle / "golden.json").read_text())["tolerances"]["max_abs"] == 5e-4
    assert (tiny.run / "train" / "training.json").stat().st_mtime_ns == trained


@pytest.mark.slow
def test_a_damaged_bundle_is_built_anew_from_the_trained_weights(
    built: TinyBuild, tiny: TinyBuild, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny.bundle / "onnx" / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run(tiny.build()) == 0
    out = capfd.readouterr().out
    assert done(out) == ["prepare", "train"] and "published" in out
    # The same bundle again but for the graphs, in which TensorFlow numbers its functions through a whole process.
    ours, theirs = (
        {item.path: item.sha256 for item in open_bundle(each.bundle).manifest.artifacts} for each in (tiny, built)
    )
    assert ours.keys() == theirs.keys()
    same = {name for name in ours if ours[name] == theirs[name]}
    assert {name for name in ours.keys() - same if not name.startswith("savedmodel/")} <= {
        "onnx/model.onnx", "ort/fp32/model.onnx", "ort/int8/model.onnx", "ort/int4/model.onnx",
        "ort/fp32/greedy.onnx", "ort/fp32/sample.onnx",
    }  # fmt: skip
    assert [path.name for path in tiny.dist.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_a_damaged_draft_is_thrown_away(tiny: TinyBuild, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", *tiny.options()]) == 0
    assert run(["export", *tiny.options()]) == 0
    assert done(capfd.readouterr().out) == ["export"]
    config = tiny.run / "export" / "bundle" / "config.json"
    config.write_text(config.read_text().replace("gpt2", "gtp2"))
    assert run(["verify", *tiny.options()]) == 1
    err = capfd.readouterr().err
    assert "run the same command again, which makes it again" in err and err.count("\n") == 1
    assert run(["verify", *tiny.options()]) == 2
    assert "run 'gpt2-bundle export'" in capfd.readouterr().err


def test_a_corpus_that_changed_is_prepared_anew(
    built: TinyBuild, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
    tiny = TinyBuild(corpus, tmp_path / "runs", tmp_path / "dist")
    assert run(["prepare", *tiny.options()]) == 0
    capsys.readouterr()
    assert run(["prepare", *tiny.options()]) == 0
    assert done(capsys.readouterr().out) == ["prepare"]
    write_corpus(corpus, lines=500)
    assert run(["train", *tiny.options()]) == 0
    assert "the corpus has changed since it was read: the build continues with what was read" in capsys.readouterr().out
    assert run(["prepare", *tiny.options()]) == 0
    assert done(capsys.readouterr().out) == []
    assert run(["export", *tiny.options()]) == 2
    assert "run 'gpt2-bundle train' with it first" in capsys.readouterr().err


def test_another_runs_bundle_in_the_same_place_is_not_taken_for_ours(
    built: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two run folders, one name and one output: the second recipe replaced the first one's bundle."""
    ours, theirs = built.copy(tmp_path / "ours"), built.copy(tmp_path / "theirs")
    recipe = Run(read_recipe(None, [*ours.settings, f'corpus.paths=["{ours.corpus}"]']), ours.run)
    assert build(recipe, ours.dist, Reporter()).folder == ours.bundle
    manifest = json.loads((theirs.bundle / "manifest.json").read_text())
    manifest["provenance"]["seed"] = 99
    (ours.bundle / "manifest.json").write_text(json.dumps(manifest))
    open_bundle(ours.bundle)
    monkeypatch.setattr("builder.stages.pipeline.prepare_stage", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        build(recipe, ours.dist, Reporter())


@pytest.mark.parametrize("what", ["a folder of other things", "a file", "a file where the output should be"])
def test_an_output_that_cannot_be_used_is_found_before_the_work(
    built: TinyBuild, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    tiny = TinyBuild(built.corpus, tmp_path / "runs", tmp_path / "dist")
    if what == "a file where the output should be":
        tiny.dist.write_text("mine")
    elif what == "a file":
        tiny.dist.mkdir()
        tiny.bundle.write_text("mine")
    else:
        tiny.bundle.mkdir(parents=True)
        (tiny.bundle / "thesis.txt").write_text("mine")
    assert run(tiny.build()) in (1, 2)
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path / "dist") in err
    assert out == "" and not (tiny.run / "prepare").exists()
    assert b"mine" in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_bundle_is_a_base_to_go_on_from(
    built: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [s for s in built.settings if not s.startswith(("model.", "tokenizer.", "training.epochs"))]
    tuned = TinyBuild(
        built.corpus,
        tmp_path / "runs",
        tmp_path / "dist",
        (*settings, "training.epochs=0.02", "training.lora_rank=2", "training.lora_targets=attn.c_attn"),
    )
    monkeypatch.chdir(built.dist.parent)
    assert run([*tuned.build(), "--base", "dist/tiny"]) == 0
    opened = open_bundle(tuned.bundle)
    assert opened.manifest.model == open_bundle(built.bundle).manifest.model
    assert opened.manifest.tokenizer.id == open_bundle(built.bundle).manifest.tokenizer.id
    assert opened.path("model.safetensors").read_bytes() != (built.bundle / "model.safetensors").read_bytes()
    assert "base: dist/tiny, fine-tuned for 0.02 epochs of 4 x 32 tokens with adamw, learning rate 5e-05" in (
        out := capsys.readouterr().out
    )
    assert "with adamw, learning rate 5e-05 (cosine, 0 steps of warm-up), weight decay 0.01" in out
    assert "LoRA of rank 2 on attn.c_attn: 512 parameters are trained (1.40% of 36,608)" in out
    quality = opened.manifest.quality
    assert (quality["lora_rank"], quality["trainable_parameters"], quality["steps"]) == (2, 512, 2)
    card = opened.path("README.md").read_text()
    assert "Fine-tuned from tiny with LoRA of rank 2 on attn.c_attn: 2 steps of 4 x 32 tokens with adamw" in card
    assert "512 of 36,608 parameters were trained" in card
    assert "LoRA of rank 2" in (tuned.run / "train" / "report.html").read_text()
    # Of the base, the card gives the folder's own name.
    assert "base_model: tiny\n" in opened.path("README.md").read_text()


def test_outputs_of_a_stage_that_were_lost_are_made_anew(
    built: TinyBuild, tiny: TinyBuild, capfd: pytest.CaptureFixture[str]
) -> None:
    """Deleted or cut since they were made: no dead end, and the checkpoint spares the training."""
    tokens, weights = tiny.run / "prepare" / "tokens" / "train.bin", tiny.run / "train" / "model.safetensors"
    tokens.write_bytes(tokens.read_bytes()[:-8])
    weights.unlink()
    assert run(["prepare", *tiny.options()]) == 0
    assert run(["train", *tiny.options()]) == 0
    out, err = capfd.readouterr()
    assert done(out) == [] and err == "" and "validation at" not in out
    for path in (tokens, weights):
        assert path.read_bytes() == (built.run / path.relative_to(tiny.run)).read_bytes()
