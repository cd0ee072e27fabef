"""The comparison of speculative with plain decoding."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.experiments.speculation import main
from serving.errors import InputError


def test_a_record_has_rates_acceptance_and_equality(real_bundle: Path, tmp_path: Path) -> None:
    lines, objects = tmp_path / "lines.txt", tmp_path / "objects.jsonl"
    lines.write_text("abcabcabc\n\nxyxyxyxy\n", encoding="utf-8")
    objects.write_text(json.dumps({"prompt": "hello hello"}) + "\n", encoding="utf-8")
    output = tmp_path / "deep" / "record.json"
    sizes = ["--new-tokens", "24", "--prompt-tokens", "12", "--rounds", "1", "--threads", "1"]
    files = ["--prompts", str(lines), "--prompts", str(objects)]
    result = CliRunner().invoke(
        main, [str(real_bundle), *files, *sizes, "--output", str(output)], standalone_mode=False
    )
    assert result.exception is None
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [(Path(row["prompts"]).name, row["temperature"], row["streams"]) for row in record["rows"]] == [
        ("lines.txt", 0.0, 2), ("lines.txt", 0.8, 2), ("objects.jsonl", 0.0, 1), ("objects.jsonl", 0.8, 1)
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["tokens"] == {"equal": 24 * row["streams"], "of": 24 * row["streams"]}
        assert row["generated_tokens"] == 24 * row["streams"] and row["tokens_per_second"]["on"]["median"] > 0
        assert row["accepted_prompt_tokens"] <= row["drafted_prompt_tokens"]


def test_a_file_without_prompts_is_refused(real_bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    result = CliRunner().invoke(main, [str(real_bundle), "--prompts", str(empty)], standalone_mode=False)
    assert isinstance(result.exception, InputError) and "one on each line" in str(result.exception)
