"""Contestants of one precision, in turns at one batch size, between samples of what the machine can do."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.bundle_targets import read_text
from benchmarks.common.decode_step import cut_prompts, step_bytes
from benchmarks.common.hardware import BandwidthProbe, ComputeProbe, busy_seconds, environment, usable_cores
from benchmarks.common.statistics import summarise
from benchmarks.peers.child import Child
from benchmarks.peers.protocol import Job, Run
from serving.bundle import Bundle, Geometry
from serving.errors import GPT2BundleError

OWN = "gpt2-bundle"
# What each peer runs; its module is benchmarks.peers.NAME_peer, its environment .venv-peer-NAME.
PEERS = {
    "torch": ("fp32", "int8"),
    "openvino": ("fp32", "int8", "int4"),
    "ctranslate2": ("fp32", "int8"),
    "genai": ("fp32", "int8", "int4"),
    "llama": ("fp32", "int8", "int4"),
    "keras_hub": ("fp32",),
}
PRECISIONS = ("fp32", "int8", "int4")
# A runtime's threads go on spinning for a while after its last call; the next contestant waits that long.
_PAUSE = 0.3


@dataclass(frozen=True)
class Setting:
    """One contest: rows of `prompt_tokens` each, `new_tokens` steps, every contestant in each of `repeats` rounds."""

    precision: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int


def commands(precision: str, environments: Path) -> dict[str, list[str]]:
    """The commands of the contestants at a precision: ours, and every peer that is installed in the folder."""
    found = {OWN: [sys.executable, "-m", "benchmarks.peers.bundle_peer"]}
    for name, precisions in PEERS.items():
        folder = environments.absolute() / f".venv-peer-{name}"
        if precision in precisions and (folder / "installed").exists():
            found[name] = [str(folder / "bin" / "python"), "-m", f"benchmarks.peers.{name}_peer"]
    return found


class Contest:
    """Runs contests on one bundle.

    Args:
        bundle: an opened bundle.
        contestants: command by name, as from `commands`; ours is among them.
        work: the folder for conversions and logs.
        say: gets a line as each contestant's turn begins.
    """

    def __init__(
        self, bundle: Bundle, contestants: dict[str, list[str]], work: Path, say: Callable[[str], None]
    ) -> None:
        self.bundle, self.contestants, self.work, self.say = bundle, contestants, work, say
        self.failed: dict[str, str] = {}

    def hold(self, setting: Setting) -> dict[str, Any]:
        """Run one contest and return its record: conditions, and a row for each contestant.

        A peer that fails stands in `failed` with its error. Raises GPT2BundleError if our own contestant does.
        """
        self.failed = {}
        geometry = self.bundle.manifest.model
        prompts = cut_prompts(read_text(self.bundle), setting.batch_size, setting.prompt_tokens)
        bandwidth, compute = BandwidthProbe(), ComputeProbe()
        runs: dict[str, list[Run]] = defaultdict(list)
        with ExitStack() as stack:
            children = {name: stack.enter_context(self._start(name, setting)) for name in self.contestants}
            for child in children.values():
                self._load(child, setting, prompts)
            for repeat in range(setting.repeats):
                bandwidth.sample(5)
                compute.sample()
                names = [name for name in children if name not in self.failed]
                turn = repeat % len(names)
                for name in names[turn:] + names[:turn]:
                    child = children[name]
                    time.sleep(_PAUSE)
                    before, began = busy_seconds() - child.cpu_seconds(), time.perf_counter()
                    run = self._turn(child, setting, prompts, setting.new_tokens)
                    if run is not None:
                        runs[name].append(run)
                        others = busy_seconds() - child.cpu_seconds() - before
                        child.disturbance.append(others / (time.perf_counter() - began) / usable_cores())
        fastest = max(bandwidth.samples)
        rows = [row(children[name], geometry, setting, runs[name], fastest) for name in children if runs[name]]
        return {
            **asdict(setting),
            "environment": environment(),
            "read_bandwidth_bytes_per_second": fastest,
            "read_bandwidth_samples": bandwidth.samples,
            "numpy_fp32_flop_per_second": max(compute.samples),
            "numpy_fp32_flop_samples": compute.samples,
            "rows": rows,
            "failed": self.failed,
        }

    def _start(self, name: str, setting: Setting) -> Child:
        log = self.work / "logs" / f"{name}-{setting.precision}-{setting.batch_size}.log"
        return Child(name, self.contestants[name], log, usable_cores())

    def _load(self, child: Child, setting: Setting, prompts: list[list[int]]) -> None:
        """Load one contestant, and let it run once without counting."""
        self.say(f"{setting.precision}, batch {setting.batch_size}: {child.name} loads")
        job = Job(
            bundle=str(self.bundle.folder.absolute()),
            precision=setting.precision,
            work=str(self.work.absolute()),
            threads=usable_cores(),
            rows=setting.batch_size,
            capacity=setting.prompt_tokens + setting.new_tokens + 1,
        )
        try:
            child.load(job)
        except GPT2BundleError as error:
            self._fail(child.name, error)
        else:
            time.sleep(_PAUSE)
            self._turn(child, setting, prompts, min(2, setting.new_tokens))

    def _turn(self, child: Child, setting: Setting, prompts: list[list[int]], new_tokens: int) -> Run | None:
        self.say(f"{setting.precision}, batch {setting.batch_size}: {child.name} runs {new_tokens} steps")
        try:
            return child.run(prompts, new_tokens)
        except GPT2BundleError as error:
            self._fail(child.name, error)
            return None

    def _fail(self, name: str, error: GPT2BundleError) -> None:
        if name == OWN:
            raise error
        self.say(f"{name} is left out: {error}")
        self.failed[name] = str(error)


def row(child: Child, geometry: Geometry, setting: Setting, runs: Sequence[Run], bandwidth: float) -> dict[str, Any]:
    """One contestant's figures in milliseconds; `floor_ms` is what a step reads, at `bandwidth` bytes/s.

    `prefill_operations_per_second` may pass numpy's float32 product, a yardstick and not the processor's limit.
    `disturbance` is the largest share of the cores that others took in any of its turns.
    """
    prefill = summarise([run.prefill * 1e3 for run in runs])
    decode = summarise([seconds * 1e3 for run in runs for seconds in run.steps])
    assert prefill is not None and decode is not None
    cached = setting.prompt_tokens + setting.new_tokens / 2
    floor = step_bytes(geometry, setting.precision, setting.batch_size, cached) / bandwidth * 1e3
    operations = prefill_flops(geometry, setting.batch_size, setting.prompt_tokens)
    return {
        "contestant": child.name,
        "versions": child.versions,
        "notes": child.notes,
        "prefill_ms": asdict(prefill),
        "decode_ms": asdict(decode),
        "decode_tokens_per_second": setting.batch_size / decode.median * 1e3,
        "floor_ms": floor,
        "floor_over_decode": floor / decode.median,
        "prefill_operations_per_second": operations / prefill.median * 1e3,
        "disturbance": max(child.disturbance),
        "tokens": runs[0].tokens,
        "tokens_sha256": sorted({_digest(run.tokens) for run in runs}),
    }


def prefill_flops(geometry: Geometry, rows: int, tokens: int) -> float:
    """Operations of a prefill: the blocks' products, causal attention, and the head on each row's last token."""
    width, layers = geometry.n_embd, geometry.n_layer
    blocks = layers * 2 * (4 * width * width + 2 * width * geometry.n_inner) * tokens
    attention = layers * 2 * 2 * width * tokens * (tokens + 1) / 2
    return rows * (blocks + attention + 2 * width * geometry.vocab_size)


def _digest(tokens: list[list[int]]) -> str:
    return hashlib.sha256(np.array(tokens, "<i8").tobytes()).hexdigest()
