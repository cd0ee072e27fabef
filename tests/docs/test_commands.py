"""Every command of README and docs/ is one that exists; the light ones run, as they stand, on a tiny bundle."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest

from serving.cli import cli, run
from tests.docs.pages import AROUND, CHECKED, PAGES, ROOT, ShellCommand, commands_of, every_command
from tests.serving.distribution.keys import key_pair
from tests.serving.tf_serving_emulator import serving
from tests.tiny_build import TinyBuild

LIGHT = ("generate", "inspect", "deploy", "lint", "recipe", "batch", "sbom", "sign", "verify-signature", "completion")
BUNDLE = "gpt2-docs"


def parse(arguments: list[str]) -> None:
    """Parse a command line of gpt2-bundle without running it; raises click.UsageError for what it does not take."""
    command: click.Command = cli
    context, rest = None, arguments
    while isinstance(command, click.Group):
        context = command.make_context(command.name, rest, parent=context)
        words = [*context._protected_args, *context.args]
        _, found, rest = command.resolve_command(context, words)
        assert found is not None, words
        command = found
    command.make_context(command.name, list(rest), parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_checked_or_belongs_to_the_shell(page: Path) -> None:
    unknown = [str(command) for command in commands_of(page) if command.words[0] not in (*CHECKED, *AROUND)]
    assert not unknown


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the small files that the pages name."""
    request = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2}}
    (tmp_path / "requests.jsonl").write_text(json.dumps(request) + "\n", encoding="utf-8")
    (tmp_path / "schema.json").write_text('{"type": "integer", "minimum": 0, "maximum": 9}', encoding="utf-8")
    for name in ("signer.pem", "signer.pub", "dist/gpt2-docs.cdx.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", every_command("gpt2-bundle"), ids=str)
def test_its_options_exist(command: ShellCommand, files: Path) -> None:
    parse(list(command.words[1:]))


def test_the_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    commands = every_command("make")
    assert commands
    for command in commands:
        for word in command.words[1:]:
            name, equals, _ = word.partition("=")
            assert name in (variables if equals else targets), str(command)
    for page in PAGES:
        for name in re.findall(r"`make ([a-z0-9-]+)", page.read_text(encoding="utf-8")):
            assert name in targets, f"{page.name}: make {name}"


def test_the_modules_that_pages_run_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"python -m ([a-z_.]+)", page.read_text(encoding="utf-8")):
            assert importlib.util.find_spec(name), f"{page.name}: {name}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".md":
                assert anchor in _anchors(file), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of `page`."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def at_home(built: TinyBuild, files: Path) -> Path:
    """The same folder with the bundles that the pages name, one of them with a chat template."""
    shutil.copytree(built.bundle, files / "dist" / BUNDLE)
    with_chat_template(built.bundle, files / "dist" / "gpt2-docstrings")
    key_pair(files)
    return files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_light_commands_run_as_they_stand(page: Path, at_home: Path) -> None:
    light = [
        command
        for command in commands_of(page)
        if command.words[0] == "gpt2-bundle"
        and command.words[1:2]
        and (command.words[1] in LIGHT or any(word == "--gguf" or word.startswith("oci:") for word in command.words))
    ]
    for command in light:
        assert run(list(command.words[1:])) == 0, str(command)


def with_chat_template(bundle: Path, folder: Path) -> Path:
    """A copy of `bundle` in `folder`, with a chat template that its manifest names."""
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    shutil.copytree(bundle, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | {"chat_template": template}
    data = json.dumps(settings).encode()
    (folder / "tokenizer_config.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (entry,) = (each for each in manifest["artifacts"] if each["path"] == "tokenizer_config.json")
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def servers(built: TinyBuild, real_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """A server for each port that the pages name: `serve` at 8000, and an emulator of TensorFlow Serving at 8501."""
    bundle = with_chat_template(built.bundle, tmp_path_factory.mktemp("served") / "tiny")
    command = [sys.executable, "-m", "serving.cli", "serve", str(bundle), "--port", "0"]
    with (
        serving(real_bundle / "savedmodel/1", BUNDLE) as emulator,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line, server.stderr.read()
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield {8000: line.split()[-1], 8501: emulator.url}
        server.kill()


@pytest.mark.parametrize("command", every_command("curl"), ids=str)
def test_requests_are_answered(command: ShellCommand, servers: dict[int, str]) -> None:
    words = list(command.words[1:])
    headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    data = next((words[at + 1] for at, word in enumerate(words) if word in ("-d", "--data")), None)
    url = next(word for word in words if re.match(r"(http://)?(localhost|127\.0\.0\.1):", word))
    parts = urlsplit(url if "://" in url else f"http://{url}")
    assert parts.port in servers, str(command)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    if parts.port == 8000:
        path = re.sub(r"/models/[^/:]+", "/models/tiny", path)
    request = urllib.request.Request(servers[parts.port] + path, data.encode() if data else None, headers)
    if data:
        json.loads(data)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200 and answer.read()
