"""`gpt2-bundle batch` as a process over a real bundle, killed and run again; its refusals, each one line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.cli import run
from tests.tiny_build import Fails

ROOT = Path(__file__).parents[3]


def write_requests(path: Path, count: int, **body: object) -> None:
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, **body}
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": [number % 250 + 1, number // 250 + 1], **fields}}
        for number in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def texts(path: Path) -> dict[str, str]:
    """Texts by custom_id, of which each may be there once."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        assert answer["custom_id"] not in found
        found[answer["custom_id"]] = answer["response"]["body"]["choices"][0]["text"]
    return found


def test_a_batch_is_answered_and_the_same_command_adds_nothing(
    real_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_requests(requests, 40)
    arguments = ["batch", str(real_bundle), str(requests), str(answers), "--max-num-seqs", "4"]
    assert run(arguments) == 0
    assert "40 answers, 40 of them new, 0 errors" in capfd.readouterr().out
    once = texts(answers)
    assert len(once) == 40
    with requests.open("a") as file:
        file.write('{"custom_id": "odd", "method": "POST", "url": "/v1/completions", "body": {"prompt": 7}}\n')
    assert run(arguments) == 1, "one of its lines is an error"
    assert "41 answers, 1 of them new, 1 errors" in capfd.readouterr().out


def test_refusals(real_bundle: Path, tmp_path: Path, fails: Fails) -> None:
    requests = tmp_path / "in.jsonl"
    write_requests(requests, 1)
    bundle, there = str(real_bundle), str(requests)
    fails(["batch", bundle, there, there], 2, "requests and answers are one file")
    fails(["batch", bundle, str(tmp_path / "none"), "out"], 2, "does not exist")
    fails(["batch", str(tmp_path / "none"), there, str(tmp_path / "out")], 2, "there is no such folder")
    (tmp_path / "text").write_text("not an answer\n")
    fails(["batch", bundle, there, str(tmp_path / "text")], 2, "line 1 is not an answer of a batch")
    fails(["batch", bundle, there, str(tmp_path)], 1, "Is a directory")


@pytest.mark.slow
def test_ten_kills_lose_and_double_nothing(real_bundle: Path, tmp_path: Path) -> None:
    requests, answers, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    write_requests(requests, 3000, max_tokens=24)

    def start(target: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "serving.cli", "batch", str(real_bundle), str(requests), str(target)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    seconds, killed = random.Random(7), 0
    while killed < 10:
        before = answers.stat().st_size if answers.exists() else 0
        batch = start(answers)
        while batch.poll() is None and (not answers.exists() or answers.stat().st_size <= before):
            time.sleep(0.005)
        time.sleep(seconds.random() * 0.3)
        assert batch.poll() is None, "it came to its end before it was killed ten times"
        batch.kill()
        batch.communicate()
        killed += 1
    for target in (answers, whole):
        batch = start(target)
        _, err = batch.communicate(timeout=300)
        assert batch.returncode == 0, err
    assert texts(answers) == texts(whole) and len(texts(whole)) == 3000
