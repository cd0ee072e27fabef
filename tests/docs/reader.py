"""A reader who types the pages' commands: a folder with what they name, and an environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import ROOT
from tests.docs.test_commands import with_chat_template
from tests.tiny_build import TinyBuild, write_corpus


@dataclass
class Reader:
    """Somebody who types a page's commands in one folder."""

    folder: Path
    environment: dict[str, str]
    tf_serving: str = ""
    grpc: str = ""
    hub: Callable[[str], dict[str, bytes]] | None = None

    def start(self, words: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "serving.cli", *words[1:]] if words[0] == "gpt2-bundle" else words
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, words: list[str], codes: tuple[int, ...] = (0,)) -> str:
        process = self.start(words)
        out, err = process.communicate(timeout=1500)
        assert process.returncode in codes, (shlex.join(words), out[-500:], err[-2000:])
        return out + err


def write_folder(folder: Path, built: TinyBuild) -> None:
    """What the pages name: texts, a base `gpt2`, bundles in dist/ and models/, recipes, an installed Makefile."""
    text = built.corpus.read_text(encoding="utf-8")
    for name in ("notes", "held-out", "data", "models", "dist", "recipes", "runs"):
        (folder / name).mkdir()
    for number in range(8):
        write_corpus(folder / "notes" / f"{number}.txt", 100 + number)
    write_corpus(folder / "held-out" / "a.md", 60)
    lines = text.splitlines()
    records = [json.dumps({"body": " ".join(lines[at : at + 3])}) for at in range(0, len(lines), 3)]
    (folder / "data" / "a.jsonl").write_text("\n".join(records), encoding="utf-8")
    pairs = [json.dumps({"signature": f"def {line.split()[0]}(n):", "docstring": line}) for line in lines]
    (folder / "pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    chinese = "".join(
        f"第{number}章。今天是星期{'一二三四五六日'[number % 7]}，天气很好，我们去公园散步。\n" for number in range(300)
    )
    (folder / "novel.txt").write_text(chinese, encoding="utf-8")
    (folder / "old.txt").write_text(chinese, encoding="gb18030")
    for recipe in (ROOT / "recipes").iterdir():
        shutil.copy(recipe, folder / "recipes")
    shutil.copytree(built.bundle, folder / "gpt2")
    shutil.copytree(built.bundle, folder / "models" / "1")
    with_chat_template(built.bundle, folder / "dist" / "gpt2-docs")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "installed").touch()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
        os.utime(folder / name, (0, 0))
