"""The commands of README and docs/ that take long, run as they stand: with smaller settings added at their end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.bundle import open_bundle
from tests.docs.pages import CHECKED, PAGES, ROOT, ShellCommand, commands_of, every_command
from tests.docs.reader import Reader, write_folder
from tests.docs.test_commands import LIGHT
from tests.serving.distribution.fake_hub import running_hub
from tests.serving.tf_serving_emulator import serving
from tests.tiny_build import SETTINGS, TinyBuild

TUTORIAL = {command.words for command in commands_of(ROOT / "docs/guides/tutorial.md")}
# What each line of a page that does not run here needs instead. `make test` is what runs this.
ELSEWHERE = {
    ("make", "test"): "the tests themselves",
    ("python", "-m", "serving.ray.batch"): "tests/ecosystem/test_ray.py: Ray",
}
# In the order in which a reader comes to them: a command may need what one above has made.
ORDER = (
    "openssl",
    "make",
    "prepare",
    "train",
    "export",
    "verify",
    "build",
    "evaluate",
    "serve",
    "client",
    "bench",
    "publish",
)
# A training of seconds. Keys that a command or its recipe's base decides stay as they are.
SMALL = [*(setting for setting in SETTINGS if not setting.startswith("name=")), "export.slots=0"]
# The recipe's own templates are longer than the small base's context.
SHORT_TEMPLATES = ["instruction.user_template={content}", "instruction.assistant_template= {content}"]
# The gate tells nothing from fewer repeats than five.
BENCH = ["--repeats", "5", "--batch-size", "1", "--new-tokens", "4", "--target", "ort/fp32"]
BENCH_ALL = [
    *BENCH,
    *("--target", "server=ort/fp32", "--requests", "2", "--clients", "1"),
    *("--sweep-limit", "3", "--sweep-seconds", "0.5", "--cold-starts", "1"),
]


def kind_of(command: ShellCommand) -> str:
    return command.words[1] if command.words[0] == "gpt2-bundle" else command.words[0]


def runs_elsewhere(command: ShellCommand) -> bool:
    """Whether another test of this folder runs the command, or one that ELSEWHERE names."""
    words = command.words
    oci = words[0] == "gpt2-bundle" and any(word == "--gguf" or word.startswith("oci:") for word in words)
    return (
        words[0] == "curl"
        or (words[0] == "gpt2-bundle" and words[1] in LIGHT)
        or oci
        or words in TUTORIAL
        or any(words[: len(start)] == start for start in ELSEWHERE)
    )


def long_commands() -> list[ShellCommand]:
    """The commands that run here, each once, though several pages may have it."""
    once: dict[tuple[str, ...], ShellCommand] = {}
    for command in every_command(*CHECKED, "openssl"):
        if not runs_elsewhere(command):
            once.setdefault(command.words, command)
    return sorted(once.values(), key=lambda command: ORDER.index(kind_of(command)))


def test_every_command_is_executed_by_a_test() -> None:
    unknown = [
        str(command)
        for command in every_command(*CHECKED)
        if not runs_elsewhere(command) and kind_of(command) not in ORDER
    ]
    assert not unknown
    assert {kind_of(command) for command in long_commands()} == set(ORDER) - {"prepare"}


@pytest.fixture(scope="module")
def reader(built: TinyBuild, real_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader's folder, with a hub and TensorFlow Serving's emulator to ask."""
    folder = tmp_path_factory.mktemp("reader")
    write_folder(folder, built)
    settings = {"HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
    with running_hub() as hub, serving(real_bundle / "savedmodel/1", "gpt2-docs") as emulator:
        environment = os.environ | settings | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url}
        yield Reader(folder, environment, emulator.url, emulator.address, lambda name: dict(hub.files(name)))


def smaller(words: list[str]) -> list[str]:
    """The command with a small training: settings at its end, which replace none of its own."""
    own = {word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--set"}
    sections = ("model", "tokenizer") if "--base" in words else ("model",) if "model.preset" in own else ()
    settings = [each for each in SMALL if each.partition("=")[0] not in own and each.partition(".")[0] not in sections]
    if "recipes/instruct.toml" in words:
        settings += SHORT_TEMPLATES
    return [*words, *(word for setting in settings for word in ("--set", setting))]


def built_name(words: list[str]) -> str:
    """The name of the bundle that a build's command line asks for, by itself or by its recipe."""
    for word in words:
        if word.startswith("name="):
            return word.removeprefix("name=")
    if "--recipe" in words:
        recipe = ROOT / words[words.index("--recipe") + 1]
        return re.findall(r'^name = "(.+)"', recipe.read_text(encoding="utf-8"), re.MULTILINE)[0]
    return "gpt2-docs"


def builds(reader: Reader, words: list[str]) -> None:
    """`build`: a verified bundle with what README's table names, and last lines that name the reports."""
    if "verify.better_than=trigram" in words:
        said = reader.run(smaller(words), codes=(0, 1))
        assert "published dist/" in said or "as verify.better_than asks for" in said, said
        return
    if any(word.startswith("training.worker_timeout") for word in words):
        with_two_workers(reader, words)
        return
    name = built_name(words)
    # Another page may have asked for the same bundle, which would not be built again.
    shutil.rmtree(reader.folder / "dist" / name, ignore_errors=True)
    shutil.rmtree(reader.folder / "runs" / name, ignore_errors=True)
    said = reader.run(smaller(words))
    bundle = open_bundle(reader.folder / "dist" / name)
    assert bundle.manifest.parity["status"] in ("verified", "too few tokens")
    table = re.findall(
        r"^\| ((?:`[\w./-]+`(?:, )?)+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    left_out = [f"{path}" for path in bundle.manifest.parity["left_out"]]
    for path in re.findall(r"`([\w./-]+)`", " ".join(table)):
        assert (bundle.folder / path).exists() or path in left_out, path
    last = said.splitlines()
    assert any(line.startswith("try it: gpt2-bundle generate dist/") for line in last)
    for what in ("data report: runs/", "training report: runs/", "certificate: dist/", "model card: dist/"):
        assert any(line.startswith(what) for line in last), what
    if "--base" in words and "gpt2" in words:
        assert "fine-tuned for" in said and "with adamw" in said
    if "recipes/lora.toml" in words:
        assert "LoRA of rank 8" in said and "parameters are trained" in said
    if any(word.startswith("tracking.tools") for word in words):
        tool = next(word for word in words if word.startswith("tracking.tools")).partition("=")[2]
        assert f"tracking: {tool} is not installed" in said or f"\n{tool}: " in said


def with_two_workers(reader: Reader, words: list[str]) -> None:
    """The page's TF_CONFIG with addresses of this machine, in two processes."""
    (line,) = [command.words[1] for command in every_command("export") if command.words[1].startswith("TF_CONFIG=")]
    config = json.loads(line.partition("=")[2])
    with contextlib.ExitStack() as ports:
        sockets = [ports.enter_context(socket.socket()) for _ in config["cluster"]["worker"]]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        config["cluster"]["worker"] = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    workers = []
    for rank in range(len(config["cluster"]["worker"])):
        config["task"]["index"] = rank
        one = Reader(reader.folder, reader.environment | {"TF_CONFIG": json.dumps(config)})
        workers.append(one.start(smaller(words)))
    for worker in workers:
        out, err = worker.communicate(timeout=1500)
        assert worker.returncode == 0, (out[-500:], err[-2000:])
    assert open_bundle(reader.folder / "dist/notes")


def stages(reader: Reader, words: list[str]) -> None:
    """`train`, `export`, `verify`: each leaves its work where the pages say."""
    settings = smaller(words)
    if words[1] == "train":
        reader.run(["gpt2-bundle", "prepare", *settings[2:]])
        assert (reader.folder / "runs/notes/prepare/report.html").is_file()
    reader.run(settings)
    found = {
        "train": "train/metrics.jsonl",
        "export": "export/bundle/manifest.json",
        "verify": "export/verification.json",
    }
    assert (reader.folder / "runs/notes" / found[words[1]]).is_file()
    assert (reader.folder / "runs/notes/train/report.html").is_file()


def serves(reader: Reader, words: list[str]) -> None:
    """`serve`: answers at the address that it prints, and ends with code 0 at SIGTERM, as the guide says."""
    with reader.start([*words, "--port", "0"]) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line, server.communicate()
            with urllib.request.urlopen(line.split()[-1] + "/v1/models", timeout=60) as answer:
                names = [model["id"] for model in json.load(answer)["data"]]
            assert names == (["docs"] if "--served-model-name" in words else ["gpt2-docs"])
        finally:
            server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=120)
        assert server.returncode == 0, err[-2000:]


def asks(reader: Reader, words: list[str]) -> None:
    """`client`: a text for each prompt, from the emulator of TensorFlow Serving."""
    host = reader.tf_serving if "--url" in words else reader.grpc
    said = reader.run([host if re.search(r"127\.0\.0\.1:850\d", word) else word for word in words])
    assert said.strip()


def measures(reader: Reader, words: list[str]) -> None:
    """`bench`: a verdict, the files next to --output, and a gate that equal records pass."""
    if words[2] == "gate":
        for path in (words[3], words[words.index("--baseline") + 1]):
            if not (reader.folder / path).exists():
                shutil.copy(reader.folder / "runs/r.json", reader.folder / path)
        reader.run(words)
        return
    if words[2] == "selftest":
        # Its answer is about this machine, on which other tests run: 1 is the right one where it was late.
        assert "%" in reader.run(words, codes=(0, 1))
        return
    said = reader.run([*words, *(BENCH_ALL if "--scenario" in words else BENCH)])
    assert "ort/fp32" in said
    if "--output" in words:
        record = reader.folder / words[words.index("--output") + 1]
        for suffix in (".json", ".md", ".csv", ".html"):
            assert record.with_suffix(suffix).is_file(), suffix


def publishes(reader: Reader, words: list[str]) -> None:
    """`publish hub:`: the repository holds the bundle's files."""
    reader.run(words)
    assert reader.hub is not None
    there = reader.hub(next(word for word in words if word.startswith("hub:")).removeprefix("hub:"))
    for artifact in open_bundle(reader.folder / "dist/gpt2-docs").manifest.artifacts:
        assert artifact.path in there


def makes(reader: Reader, words: list[str]) -> None:
    """`make bundle`: the command line that its recipe has, run as any build."""
    done = subprocess.run(
        ["make", "--dry-run", *words[1:]], cwd=reader.folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "gpt2-bundle" in line]
    assert lines, done.stdout
    for line in lines:
        assert line[0] == ".venv/bin/gpt2-bundle" and line[1] == "build"
        builds(reader, ["gpt2-bundle", *line[1:]])


@pytest.mark.slow
@pytest.mark.parametrize("command", long_commands(), ids=str)
def test_long_commands_run(command: ShellCommand, reader: Reader) -> None:
    words = list(command.words)
    kind = kind_of(command)
    if kind == "openssl":
        reader.run(words)
        assert (reader.folder / words[-1]).read_text().startswith("-----BEGIN")
    elif kind == "evaluate":
        assert "perplexity" in reader.run(words).lower()
    else:
        doers = {"make": makes, "build": builds, "train": stages, "export": stages, "verify": stages, "serve": serves,
                 "client": asks, "bench": measures, "publish": publishes}  # fmt: skip
        doers[kind](reader, words)


def test_a_command_that_nothing_runs_is_found() -> None:
    wrong = ShellCommand(PAGES[0], 1, ("gpt2-bundle", "sing", "dist/gpt2-docs"))
    assert not runs_elsewhere(wrong) and kind_of(wrong) not in ORDER


def test_settings_of_the_page_stay() -> None:
    words = ["gpt2-bundle", "build", "--base", "gpt2", "--set", "training.epochs=8"]
    added = smaller(words)[len(words) :]
    assert "training.batch_size=4" in added and "verify.prompts=4" in added
    assert not any(word.startswith(("training.epochs", "model.", "tokenizer.", "name")) for word in added)
