"""Prompts that a bundle brings, and how they stand in a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving.bundle.examples import example_messages, example_prompts, generate_arguments, shell_quoted
from serving.support.json_line import json_line


def test_a_bundle_names_its_own_prompts(tmp_path: Path) -> None:
    assert example_prompts(tmp_path) == ["Return the"]
    for content in ("{", "[]", "{}", '{"examples": 3}', '{"examples": ["", 7]}'):
        (tmp_path / "golden.json").write_text(content)
        assert example_prompts(tmp_path) == ["Return the"], content
    (tmp_path / "golden.json").write_text(json.dumps({"examples": ["话说天下", "two"]}))
    assert example_prompts(tmp_path) == ["话说天下", "two"]
    assert example_messages(tmp_path) == [] and generate_arguments(tmp_path) == "'话说天下'"
    (tmp_path / "golden.json").write_text(json.dumps({"examples": ["User:\nHi"], "example_messages": ["Who's there?"]}))
    assert generate_arguments(tmp_path) == "--chat " + shell_quoted("Who's there?")


@pytest.mark.parametrize("text", ["话说天下", "it's", "a\nb\tc", "$(rm) `x` \\", "\x1b[31mred"])
def test_a_prompt_is_one_word_of_a_shell(text: str) -> None:
    quoted = shell_quoted(text)
    assert "\n" not in quoted and quoted.isprintable()
    said = subprocess.run(["sh", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True).stdout
    assert said == " ".join(text.replace("\x1b", " ").split())


def test_json_shows_text_where_the_terminal_can() -> None:
    program = (
        "from serving.support.json_line import json_line; print(json_line({'text': '话', 'half': '\\udc80'[:HALF]}))"
    )
    for encoding, half, expected in (("utf-8", 0, "话"), ("ascii", 0, r"\u8bdd"), ("utf-8", 1, r"\u8bdd")):
        result = subprocess.run(
            [sys.executable, "-c", program.replace("HALF", str(half))],
            capture_output=True, check=True, env={"PYTHONIOENCODING": encoding}, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        assert expected.encode() in result.stdout
    assert json.loads(json_line({"a": "话"})) == {"a": "话"}
