"""What a person can get wrong, through the command line: one line that begins with "error: ", and the right exit code.

2 is for what was asked for wrongly, 1 for what failed. Nothing that was there before is touched.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from builder.workspace import locked
from serving.bundle import open_bundle
from serving.cli import run
from tests.tiny_build import TinyBuild, write_corpus

STAGES = ("prepare", "train", "export", "verify", "build")

Fails = Callable[..., str]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail as it should; return its one line."""

    def check(arguments: list[str], code: int, *words: str) -> str:
        capfd.readouterr()
        got = run(arguments)
        _, err = capfd.readouterr()
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err and "internal error" not in err, err
        assert got == code, err
        for word in words:
            assert word in err, err
        return err

    return check


@pytest.fixture
def fresh(tmp_path: Path) -> TinyBuild:
    """A build of which nothing is done."""
    return TinyBuild(write_corpus(tmp_path / "corpus.txt"), tmp_path / "runs", tmp_path / "dist")


@pytest.fixture
def tiny(built: TinyBuild, tmp_path: Path) -> TinyBuild:
    """A copy of a build that is prepared, trained and published."""
    return built.copy(tmp_path)


@pytest.fixture
def bundle(built: TinyBuild, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.bundle, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Recipes and options, the same for every command that takes them.


@pytest.mark.parametrize("command", STAGES)
def test_recipes(fails: Fails, built: TinyBuild, tmp_path: Path, command: str) -> None:
    common = [command, "--runs", str(tmp_path / "runs"), "--corpus", str(built.corpus)]
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    fails([*common, "--recipe", str(tmp_path / "none.toml")], 2, "no recipe at")
    fails([*common, "--recipe", str(tmp_path)], 2, "not a text file")
    fails([*common, "--recipe", str(tmp_path / "binary.toml")], 2, "not a text file")
    fails([*common, "--set", "training.epoch=3"], 2, "did you mean 'epochs'")
    fails([*common, "--set", "model.preset=gpt2-meduim"], 2, "'gpt2-medium'")
    fails([*common, "--set", "seed=abc"], 2, "takes an integer, not 'abc'")
    fails([*common, "--set", "nonsense"], 2, "write it as key=value")
    fails(
        [*common, "--base", str(tmp_path / "none")], 2, "no such folder" if command in ("prepare", "build") else "run"
    )
    fails([*common, "--nonsense"], 2, "No such option")
    fails([*common, "--set", "corpus.paths=[]", "--corpus", str(tmp_path / "none.txt")], 2, "none.txt")
    assert not (tmp_path / "runs" / "gpt2-docs" / "prepare" / "corpus").exists()


def test_commands_and_arguments(fails: Fails) -> None:
    fails(["biuld"], 2, "no command 'biuld'; did you mean 'build'?")
    fails(["inspect"], 2, "Missing argument")
    fails(["generate", "bundle"], 2, "Missing argument")
    fails(["--nonsense"], 2, "No such option")


# Text.


@pytest.mark.parametrize("command", ["prepare", "build"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", []),
        ("blank.txt", b" \n\t\n \n" * 50, []),
        ("binary.txt", bytes(range(256)) * 40, ["binary.txt"]),
        ("zeros.txt", bytes(4096), ["zeros.txt"]),
        ("line.txt", b"One line of text that is long enough to be kept.\n", ["characters"]),
        ("few.txt", b"One line of text.\nAnother line of text.\n", ["add text"]),
        ("broken.jsonl", b'{"text": "a fine text of some length"}\n{"text": \n', ["broken.jsonl"]),
        ("field.jsonl", b'{"body": "a fine text of some length"}\n', ["text"]),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(99), ["picture.png"]),
        ("broken.txt.gz", b"\x1f\x8b\x08\x00 not really", ["broken.txt.gz"]),
    ],
)
def test_texts(
    fails: Fails, fresh: TinyBuild, tmp_path: Path, command: str, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = fresh.build() if command == "build" else ["prepare", *fresh.options()]
    arguments[arguments.index("--corpus") + 1] = str(tmp_path / name)
    fails(arguments, 2, *words)
    assert not (fresh.run / "prepare" / "stage.json").exists() and not fresh.bundle.exists()


def test_a_folder_without_text(fails: Fails, fresh: TinyBuild, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fails(["prepare", *fresh.options(), "--set", "corpus.paths=[]", "--corpus", str(tmp_path / "folder")], 2, "folder")
    fails(["prepare", *fresh.options(), "--corpus", str(tmp_path / "*.none")], 2, "*.none")


# One stage before the other.


def test_stages_out_of_order(fails: Fails, fresh: TinyBuild, tiny: TinyBuild) -> None:
    fails(["train", *fresh.options()], 2, "run 'gpt2-bundle prepare'")
    fails(["export", *fresh.options()], 2, "run 'gpt2-bundle train'")
    fails(["verify", *fresh.options()], 2, "run 'gpt2-bundle export'")
    fails(["verify", *tiny.options()], 2, "run 'gpt2-bundle export'")
    fails(["train", *tiny.options("seed=5")], 2, "run 'gpt2-bundle prepare'")
    fails(["export", *tiny.options("training.learning_rate=0.5")], 2, "run 'gpt2-bundle train'")


@pytest.mark.parametrize("command", STAGES)
def test_another_command_in_the_same_run(fails: Fails, tiny: TinyBuild, command: str) -> None:
    before = contents(tiny.runs)
    arguments = tiny.build("seed=5") if command == "build" else [command, *tiny.options("seed=5")]
    with locked(tiny.run):
        fails(arguments, 1, "another gpt2-bundle command works in", str(tiny.run))
    assert contents(tiny.runs) == before


# Folders that cannot be written, and disks that are full.


@pytest.mark.parametrize("command", STAGES)
def test_a_file_where_the_runs_should_be(fails: Fails, fresh: TinyBuild, command: str) -> None:
    arguments = fresh.build() if command == "build" else [command, *fresh.options()]
    for folder in (fresh.corpus, fresh.corpus / "below"):
        arguments[arguments.index("--runs") + 1] = str(folder)
        fails(arguments, 1, "corpus.txt")


def test_a_folder_of_the_system(fails: Fails, fresh: TinyBuild) -> None:
    arguments = fresh.build()
    for option in ("--runs", "--output"):
        changed = list(arguments)
        changed[changed.index(option) + 1] = "/proc/none"
        fails(changed, 1, "/proc/none")
    assert not (fresh.run / "prepare").exists(), "worked before it looked at the output"


def test_files_in_the_way_of_stages(fails: Fails, fresh: TinyBuild) -> None:
    fresh.run.mkdir(parents=True)
    (fresh.run / "prepare").write_text("mine")
    fails(["prepare", *fresh.options()], 1, "prepare")
    assert (fresh.run / "prepare").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small file system cannot be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        # Lazily: the tokens' memory maps may still be open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_start(fails: Fails, fresh: TinyBuild, small_disk: Any) -> None:
    disk = small_disk(16 * 1024)
    arguments = fresh.build()
    arguments[arguments.index("--runs") + 1] = str(disk)
    fails(arguments, 1, "No space left on device", "free some space")


@pytest.mark.parametrize("kilobytes", [100, 400, 700, 1000, 1400])
def test_a_disk_that_fills_up_on_the_way(
    fails: Fails, built: TinyBuild, tmp_path: Path, small_disk: Any, kilobytes: int
) -> None:
    """In preparing, in training, in exporting each kind of graph: the old bundle stays, and space lets it go on."""
    disk = small_disk(kilobytes * 1024)
    tiny = TinyBuild(built.corpus, disk / "runs", tmp_path / "dist")
    shutil.copytree(built.bundle, tiny.bundle)
    before = contents(tiny.dist)
    fails(tiny.build(), 1, "No space left on device", "free some space")
    assert contents(tiny.dist) == before
    if kilobytes == 1000:
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run(tiny.build()) == 0
        assert os.listdir(tiny.dist) == ["tiny"]  # noqa: PTH208 (all names, hidden ones too)


def test_a_full_disk_under_the_output(fails: Fails, tiny: TinyBuild, small_disk: Any) -> None:
    disk = small_disk(256 * 1024)
    arguments = tiny.build("verify.max_abs=5e-4")
    arguments[arguments.index("--output") + 1] = str(disk)
    fails(arguments, 1, "No space left on device")
    assert list(disk.iterdir()) == []


def test_a_read_only_disk(fails: Fails, tiny: TinyBuild, small_disk: Any) -> None:
    disk = small_disk(256 * 1024)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for option in ("--runs", "--output"):
        arguments = tiny.build("verify.max_abs=5e-4")
        arguments[arguments.index(option) + 1] = str(disk)
        fails(arguments, 1, "disk", "choose a folder")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
def test_what_the_disk_refuses_is_said_with_its_file(
    fails: Fails, fresh: TinyBuild, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "the/file")

    monkeypatch.setattr("builder.prepare.write_tokens", refuse)
    fails(["prepare", *fresh.options()], 1, os.strerror(number), "the/file")


# Bundles that are not what they were.

KINDS = (
    "manifest.json", "config.json", "generation_config.json", "README.md", "golden.json", "verification.json",
    "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors", "onnx/model.onnx", "onnx/model.onnx_data",
    "ort/fp32/model.onnx", "ort/fp32/model.onnx_data", "savedmodel/1/saved_model.pb",
    "savedmodel/1/variables/variables.index", "savedmodel/1/variables/variables.data-00000-of-00001",
)  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # Nothing has the manifest's own hash, so there it is a byte that the format needs.
    data[0 if path.name == "manifest.json" else len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte(fails: Fails, bundle: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    flip(bundle / name)
    before = contents(bundle)
    where = [] if name == "manifest.json" else [name]
    fails(["inspect", str(bundle)], 1, *where)
    fails(["verify", str(bundle)], 1, *where)
    # `generate` compares sizes only, to answer at once: it runs, or says what it cannot load.
    for runtime in ("onnx", "tensorflow"):
        arguments = ["generate", str(bundle), "Return", "--max-new-tokens", "1", "--runtime", runtime]
        if run(arguments) != 0:
            fails(arguments, 1)
        capfd.readouterr()
    assert contents(bundle) == before


@pytest.mark.parametrize("name", KINDS[1:])
def test_a_missing_and_a_cut_file(fails: Fails, bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
        fails(arguments, 1, name, "bytes instead of")
    (bundle / name).unlink()
    for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
        fails(arguments, 1, name, "is missing")


def test_manifests(fails: Fails, bundle: Path) -> None:
    good = json.loads((bundle / "manifest.json").read_text())
    cases: list[tuple[Any, str]] = [
        (good | {"schema_verzion": 1}, "schema_verzion"),
        (good | {"schema_version": 99}, "99"),
        ({key: value for key, value in good.items() if key != "graphs"}, "graphs"),
        (good | {"artifacts": [{**good["artifacts"][0], "path": "../up"}]}, "../up"),
        ([], "manifest.json"),
    ]
    for manifest, word in cases:
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
            fails(arguments, 1, word)
    (bundle / "manifest.json").unlink()
    for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
        fails(arguments, 1, "this is not a bundle")


def test_folders_that_are_no_bundle(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, code, words in (("none", 2, "no such folder"), ("file", 2, "is not a folder"), (".", 1, "not a bundle")):
        for command in (["inspect"], ["verify"], ["generate"]):
            arguments = [*command, str(tmp_path / name), *(["x"] if command == ["generate"] else [])]
            fails(arguments, code, words)


# Options of generate.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], ["temperature"]),
        (["--temperature", "nan"], ["temperature"]),
        (["--temperature", "inf"], ["temperature"]),
        (["--temperature", "hot"], ["--temperature"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--top-k", "1.5"], ["--top-k"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-p", "nan"], ["top_p"]),
        (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--max-new-tokens", "-4"], ["max_new_tokens"]),
        (["--seed", "x"], ["--seed"]),
        (["--seed", "9" * 30], ["seed"]),
        (["--stop", ""], ["stop"]),
        (["--runtime", "onxn"], ["no runtime 'onxn'", "'onnx'"]),
        (["--graph", "ort/fp23"], ["'ort/fp32'"]),
        (["--graph", "savedmodel/prefill"], ["--runtime tensorflow"]),
        (["--graph", "ort/fp32", "--runtime", "tensorflow"], ["--runtime onnx"]),
    ],
)
def test_options_of_generate(fails: Fails, built: TinyBuild, options: list[str], words: list[str]) -> None:
    fails(["generate", str(built.bundle), "Return", *options], 2, *words)


def test_a_prompt_longer_than_the_context(fails: Fails, built: TinyBuild) -> None:
    fails(["generate", str(built.bundle), "Return the " * 50], 2, "context of 48")


# Base checkpoints.


@pytest.fixture
def base(built: TinyBuild, tmp_path: Path) -> Path:
    """A folder with a whole checkpoint, to be spoilt."""
    folder = tmp_path / "base"
    folder.mkdir()
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    for name in names:
        shutil.copyfile(built.bundle / name, folder / name)
    return folder


def change_config(base: Path, **values: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def only_bin(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def cut(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(base: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, base / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda base: shutil.rmtree(base), ["no such folder"]),
        (lambda base: (base / "model.safetensors").unlink(), ["no model.safetensors here"]),
        (only_bin, ["pickled weights"]),
        (cut, ["cannot be read"]),
        (lambda base: (base / "model.safetensors").write_bytes(b""), ["cannot be read"]),
        (lambda base: (base / "model.safetensors").write_bytes(bytes(range(256)) * 9), ["cannot be read"]),
        (without_a_tensor, ["'ln_f.weight' is missing"]),
        (lambda base: change_config(base, n_embd=64), ["has shape"]),
        (lambda base: change_config(base, n_layer=3), ["is missing"]),
        (lambda base: change_config(base, n_head=3), ["n_head"]),
        (lambda base: change_config(base, n_positions=16), ["sequence_length"]),
        (lambda base: change_config(base, vocab_size=200), ["vocab"]),
        (lambda base: change_config(base, model_type="llama"), ["'llama'"]),
        (lambda base: change_config(base, scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
        (lambda base: change_config(base, n_embd="wide"), ["config.json"]),
        (lambda base: change_config(base, n_embd=-32), ["config.json"]),
        (lambda base: change_config(base, n_embd=0), ["config.json"]),
        (lambda base: change_config(base, eos_token_id=5000), ["eos_token_id"]),
        (lambda base: (base / "config.json").write_text("{"), ["config.json"]),
        (lambda base: (base / "config.json").write_text("[]"), ["config.json"]),
        (lambda base: (base / "config.json").write_bytes(bytes(range(256))), ["config.json"]),
        (lambda base: (base / "config.json").unlink(), ["no config.json"]),
        (lambda base: (base / "tokenizer.json").write_text("{"), ["tokenizer"]),
    ],
)
def test_bases(fails: Fails, built: TinyBuild, base: Path, tmp_path: Path, spoil: Any, words: list[str]) -> None:
    settings = tuple(each for each in built.settings if not each.startswith(("model.", "tokenizer.")))
    tiny = TinyBuild(built.corpus, tmp_path / "runs", tmp_path / "dist", settings)
    spoil(base)
    fails([*tiny.build(), "--base", str(base)], 2, *words)
    assert not tiny.dist.exists() or list(tiny.dist.iterdir()) == []


def test_a_base_that_the_hub_does_not_have(fails: Fails, fresh: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = tuple(each for each in fresh.settings if not each.startswith(("model.", "tokenizer.")))
    tiny = TinyBuild(fresh.corpus, fresh.runs, fresh.dist, settings)
    for name in ("nobody/no-such-gpt2-here", "nobody-gpt2", "two words", "a/b/c"):
        fails([*tiny.build(), "--base", name], 2, name)


# Training that goes astray.

ASTRAY = (
    "training.optimizer=adamw", "training.learning_rate=1", "training.max_grad_norm=1e38", "training.weight_decay=10",
    "training.warmup_fraction=0", "training.adam_beta2=0", "training.epochs=1",
)  # fmt: skip


def checkpoint(tiny: TinyBuild) -> dict[str, str] | None:
    path = tiny.run / "train" / "checkpoint" / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="np") as file:
        metadata: dict[str, str] = file.metadata()
        return metadata


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(fails: Fails, fresh: TinyBuild) -> None:
    line = fails(fresh.build(*ASTRAY), 1, "the loss is not a number at step", "training.learning_rate")
    assert not (fresh.run / "train" / "stage.json").exists() and not fresh.bundle.exists()
    kept = checkpoint(fresh)
    assert kept is not None and 0 < int(kept["step"]) < int(line.partition("at step ")[2].split()[0])
    losses = [row["validation_loss"] for row in json.loads(kept["history"])]
    assert losses and all(loss < 1e9 for loss in losses)
    # And again: it goes on from there, and fails in the same way.
    assert fails(fresh.build(*ASTRAY), 1) == line
    assert checkpoint(fresh) == kept


def test_a_validation_that_is_no_number_is_no_checkpoint(
    fails: Fails, tiny: TinyBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    from builder.training import LanguageModel

    shutil.rmtree(tiny.run / "train")
    real, count = LanguageModel.evaluate, [0]

    def evaluate(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        logs = real(self, *arguments, **options)
        return logs | {"perplexity": float("nan")} if count[0] == 2 else logs

    monkeypatch.setattr(LanguageModel, "evaluate", evaluate)
    fails(["train", *tiny.options()], 1, "not a number at step 4 of 6", "the checkpoint of step 2 is kept")
    kept = checkpoint(tiny)
    assert kept is not None and kept["step"] == "2"


def test_without_a_checkpoint_none_is_said_to_be_kept(fails: Fails, fresh: TinyBuild) -> None:
    line = fails(fresh.build(*ASTRAY, "training.validations=1"), 1, "the loss is not a number")
    assert checkpoint(fresh) is None and "is kept" not in line


# Ctrl-C, and a reader that goes away.


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "serving.cli", *arguments], cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def interrupt(tiny: TinyBuild, words: str, delay: float = 0.0) -> None:
    with start(tiny.build()) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if words in line:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert err == "error: interrupted; the same command goes on from the last finished stage\n"
    assert process.returncode == 130
    assert not tiny.bundle.exists()


def test_an_interrupt_in_training_is_one_line(fresh: TinyBuild) -> None:
    interrupt(fresh, "validation at step 2")
    assert run(["prepare", *fresh.options()]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", ["corpus:", "tokens:", "model:", "exported onnx", "exported ort", "compared logits"])
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.9])
def test_an_interrupt_anywhere_is_one_line(fresh: TinyBuild, words: str, delay: float) -> None:
    if words == "compared logits" and delay > 0:
        pytest.skip("it may have ended by then")
    interrupt(fresh, words, delay)
    assert run(fresh.build()) == 0
    open_bundle(fresh.bundle)


def test_a_reader_that_goes_away_gets_no_traceback(fresh: TinyBuild) -> None:
    with start(["prepare", *fresh.options()]) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert "Traceback" not in err and err.count("\n") <= 1


def test_errors_come_from_the_command_itself_too(built: TinyBuild, tmp_path: Path) -> None:
    """The same through a process of its own: TensorFlow prints nothing of its own, and the exit codes arrive."""
    for arguments, code in (
        (["inspect", str(tmp_path)], 1),
        (["inspect", str(tmp_path / "none")], 2),
        (["generate", str(built.bundle), "Return", "--temperature", "-1"], 2),
        (["generate", str(built.bundle), "Return " * 50, "--runtime", "tensorflow"], 2),
    ):
        with start(arguments) as process:
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, "")
        assert err.startswith("error: ") and err.count("\n") == 1
