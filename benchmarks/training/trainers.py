"""The trainers, each a fresh process, and the cases that they run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.common.runtime_process import ROOT
from benchmarks.training.job import Sizes, TrainingJob
from serving.errors import GPT2BundleError

OWN = [sys.executable, "-m", "serving.cli"]


@dataclass(frozen=True)
class Case(Sizes):
    """Sizes, what the default recipe needs to become them, and whether the losses after training are compared."""

    recipe: tuple[str, ...] = ()
    validate: bool = False


_GPT2 = ("model.preset=gpt2", "model.vocab_size=50257", "corpus.validation_fraction=0.005")
CASES = {
    "gpt2": Case(50257, 1024, 768, 12, 12, 2, 256, 12, _GPT2),
    "default": Case(2048, 128, 192, 4, 6, 16, 128, 60),
    "loss": Case(2048, 128, 192, 4, 6, 16, 128, 600, validate=True),
}
SPEED = ("gpt2-bundle XLA", "gpt2-bundle", "torch eager", "torch.compile", "KerasHub XLA", "KerasHub")
LOSS = ("gpt2-bundle XLA", "torch eager")
# What a job and a recipe call by the same name.
_SAME = ("batch_size", "learning_rate", "warmup_fraction", "weight_decay", "max_grad_norm")


class Trainers:
    """Runs trainers on cases, in a folder for tokens, checkpoints and jobs.

    Args:
        work: that folder.
        peers: the Python of an environment with torch, transformers and KerasHub.
        say: gets a line as each process begins.
    """

    def __init__(self, work: Path, peers: Path, say: Callable[[str], None]) -> None:
        self.work, self.peers, self.say = work, peers.absolute(), say
        self.runs = work / "runs"

    def prepare(self, case: str) -> TrainingJob:
        """Make the case's tokens, and the initial weights where losses are compared, unless they are there."""
        setting = CASES[case]
        self._own("prepare", f"name={case}-start", *self._sizes(setting))
        prepared = self.runs / f"{case}-start" / "prepare" / "tokens"
        start = ""
        if setting.validate:
            self._own("train", f"name={case}-start", *self._sizes(setting), "training.epochs=0")
            start = str((self.runs / f"{case}-start" / "train").absolute())
        sizes = {each.name: getattr(setting, each.name) for each in fields(Sizes)}
        job = TrainingJob(tokens=str(prepared.absolute()), start=start, validate=setting.validate, **sizes)
        job.write(self.work / f"{case}.json")
        for xla in (True, False):
            self._own("prepare", *self._ours(case, job, xla))
        return job

    def run(self, case: str, job: TrainingJob, name: str) -> dict[str, Any]:
        """Run one trainer in processes of its own; return seconds of each step, validation loss and versions."""
        self.say(f"{case}: {name}")
        if name.startswith("gpt2-bundle"):
            return self._run_ours(case, job, name.endswith("XLA"))
        script = "torch_peer" if name.startswith("torch") else "keras_hub_peer"
        option = {"torch.compile": ["compile"], "KerasHub XLA": ["xla"]}.get(name, [])
        command = [str(self.peers), "-m", f"benchmarks.training.{script}", str(self.work / f"{case}.json"), *option]
        result: dict[str, Any] = json.loads(_run(command).splitlines()[-1])
        return result

    def _run_ours(self, case: str, job: TrainingJob, xla: bool) -> dict[str, Any]:
        settings = self._ours(case, job, xla)
        folder = self.runs / _own_name(case, xla) / "train"
        if folder.exists():
            shutil.rmtree(folder)
        self._own("train", *settings)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [record for record in records if "loss" in record]
        report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        tokens = job.batch_size * job.sequence_length
        return {
            "seconds": [tokens / record["tokens_per_second"] for record in steps],
            "losses": [record["loss"] for record in steps],
            "validation_loss": report["validation_loss"] if job.validate else None,
            "versions": {},
        }

    def _ours(self, case: str, job: TrainingJob, xla: bool) -> list[str]:
        """The recipe keys that make `gpt2-bundle train` do the job."""
        index = json.loads((Path(job.tokens) / "train.json").read_text(encoding="utf-8"))
        rows = index["count"] // job.sequence_length
        sizes = self._sizes(CASES[case])
        if job.start:
            sizes = [key for key in sizes if not key.startswith("model.")]
            sizes.append(f"model.base={json.dumps(str(Path(job.start).parent))}")
        return [
            f"name={_own_name(case, xla)}",
            *sizes,
            f"seed={job.seed}",
            "training.optimizer=adamw",
            # Half a step less, so that rounding up gives the very number.
            f"training.epochs={(job.steps - 0.5) * job.batch_size / rows}",
            *(f"training.{name}={getattr(job, name)}" for name in _SAME),
            f"training.final_learning_rate_fraction={job.final}",
            f"training.adam_beta1={job.beta1}",
            f"training.adam_beta2={job.beta2}",
            *("training.validations=1", "training.log_every=1", "training.sample_tokens=0"),
            f"training.jit_compile={str(xla).lower()}",
        ]

    def _sizes(self, case: Case) -> list[str]:
        sizes = [f"training.sequence_length={case.sequence_length}", *case.recipe]
        if not case.recipe:
            sizes += [f"model.{key}={getattr(case, key)}" for key in ("n_positions", "n_embd", "n_layer", "n_head")]
        return sizes

    def _own(self, command: str, *settings: str) -> None:
        sets = [part for setting in settings for part in ("--set", setting)]
        _run([*OWN, command, "--runs", str(self.runs), *sets])


def _own_name(case: str, xla: bool) -> str:
    return f"{case}-xla" if xla else f"{case}-plain"


def _run(command: Sequence[str]) -> str:
    """Run a process on the CPU and return its output. Raises GPT2BundleError with its last line if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise GPT2BundleError(f"{' '.join(command[1:4])} ended with {done.returncode}: {last}")
    return done.stdout
