"""The training benchmark: the data and rates that peers get are our own, and the record says what was seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.training.__main__ import WARM_UP, summary, table
from benchmarks.training.job import TrainingJob, batches, rate, validation_rows
from benchmarks.training.trainers import CASES
from builder.data.packed_batches import RowSampler
from builder.recipe import TrainingRecipe
from builder.training.optimizers import make_schedule


def job(folder: Path, **changes: object) -> TrainingJob:
    made = TrainingJob(300, 16, 8, 1, 1, 3, 16, 40, str(folder), "", True)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_peers_get_the_rows_that_our_training_takes(tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 300, 517).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    sampler = RowSampler(tokens, 16, 3, 1234)
    theirs = list(batches(job(tmp_path)))
    assert len(theirs) == 40  # Some four epochs of 32 rows.
    for step, rows in enumerate(theirs):
        np.testing.assert_array_equal(rows, sampler.batch(step))


def test_validation_rows_score_every_token_but_the_first_once(tmp_path: Path) -> None:
    tokens = np.arange(50, dtype="<u2")
    tokens.tofile(tmp_path / "validation.bin")
    targets = np.concatenate([row[1:] for row in validation_rows(job(tmp_path))])
    np.testing.assert_array_equal(targets, tokens[1:])


def test_peers_get_our_learning_rates(tmp_path: Path) -> None:
    recipe = TrainingRecipe(learning_rate=1e-3, warmup_fraction=0.05, final_learning_rate_fraction=0.05)
    schedule = make_schedule(recipe, 40)
    for step in range(40):
        assert rate(job(tmp_path), step) == pytest.approx(float(schedule(step)), rel=1e-5), step


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    made = job(tmp_path, seed=7)
    assert TrainingJob.read(made.write(tmp_path / "jobs" / "a.json")) == made


def test_the_record_leaves_out_the_warm_up_and_compares_within_rounds() -> None:
    def sample(turn: int, name: str, seconds: float) -> dict[str, object]:
        steps = [100.0] * WARM_UP + [seconds] * 4
        return {"case": "gpt2", "round": turn, "trainer": name, "seconds": steps, "validation_loss": None,
                "versions": {"torch": "1"}}  # fmt: skip

    samples = [sample(turn, "gpt2-bundle XLA", 1.0 + turn) for turn in range(2)]
    samples += [sample(turn, "torch eager", 2.0 * (1.0 + turn)) for turn in range(2)]
    loss = {**sample(0, "torch eager", 1.0), "case": "loss", "validation_loss": 2.5}
    record = summary([*samples, loss])
    ours, torch = record["rows"]
    assert ours["trainer"] == "gpt2-bundle XLA" and ours["ratio"] == 1.0
    assert torch["ratio"] == 2.0 and torch["first_step_seconds"] == 100.0
    tokens = CASES["gpt2"].batch_size * CASES["gpt2"].sequence_length
    assert torch["tokens_per_second"] == pytest.approx(tokens / 3.0)
    assert record["versions"] == {"torch": "1"}
    assert "torch eager 2.5000" in table(record)
