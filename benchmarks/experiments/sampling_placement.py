"""A decode step and the choice of its token: logits fetched and chosen on the host, or the graph `ort/choose`.

`python -m benchmarks.experiments.sampling_placement BUNDLE [--graph ort/int8] [--device cuda]` prints one JSON record.
The ways take turns, a whole continuation at a time, and must give the same tokens; "default" is what
`gpt2-bundle generate` takes.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common.bundle_targets import read_text
from benchmarks.common.decode_step import cut_prompts
from benchmarks.common.hardware import environment
from benchmarks.common.standalone import run
from benchmarks.common.statistics import summarise
from serving.backends.base import ChoosingBackend
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.errors import InputError, ParityError
from serving.generation.token_selection import Chooser, DeviceSteps, HostSteps, chooses, open_steps
from serving.sampling import SamplingParams

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition penalty 1.2": {"repetition_penalty": 1.2},
    "temperature 0.8, top-k 40, top-p 0.9": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "temperature 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    # Random weights spread their mass over the whole vocabulary; a trained model's lies on few tokens, as here.
    "temperature 0.05, top-p 0.9": {"temperature": 0.05, "top_p": 0.9},
}
WAYS: dict[str, Any] = {
    "host": lambda backend, prompts, params, capacity: HostSteps(backend, Chooser(prompts, params), prompts, capacity),
    "graph": lambda backend, prompts, params, capacity: DeviceSteps(
        backend, Chooser(prompts, params), prompts, capacity
    ),
    "default": open_steps,
}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/fp32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-sizes", default="1,4,16", show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(
    bundle: Path, graph: str, device: str, batch_sizes: str, prompt_tokens: int, new_tokens: int, repeats: int
) -> None:
    """Measure every way on the folder BUNDLE."""
    opened = open_bundle(bundle, check="sizes")
    backend = load_backend(opened, "onnx", graph, device)
    if not chooses(backend):
        raise InputError(f"{bundle}: the graph {graph!r} cannot choose tokens; take an 'ort/' graph of a new bundle")
    rows = []
    for batch_size in map(int, batch_sizes.split(",")):
        prompts = cut_prompts(read_text(opened), batch_size, prompt_tokens)
        for name, values in SETTINGS.items():
            rows += _measure(backend, prompts, name, values, new_tokens, repeats)
    print(json.dumps({"environment": environment(), "graph": graph, "device": device, "rows": rows}, indent=2))


def _measure(
    backend: ChoosingBackend,
    prompts: list[list[int]],
    name: str,
    values: dict[str, Any],
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    params = [SamplingParams(**values, seed=seed) for seed in range(len(prompts))]
    step_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    choose_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, list[Any]] = {way: [] for way in WAYS}
    rows = np.arange(len(prompts))
    for repeat in range(repeats + 1):
        for way, open_way in WAYS.items():
            steps = open_way(backend, prompts, params, len(prompts[0]) + new_tokens)
            chosen = steps.choose(rows, 0)
            made = [chosen]
            for step in range(1, new_tokens):
                began = time.perf_counter()
                steps.feed(chosen)
                fed = time.perf_counter()
                chosen = steps.choose(rows, step)
                done = time.perf_counter()
                made.append(chosen)
                # The first round warms up.
                if repeat:
                    step_ms[way].append((done - began) * 1e3)
                    choose_ms[way].append((done - fed) * 1e3)
            tokens[way].append(np.stack(made))
    for way, made_this_way in tokens.items():
        if not all(np.array_equal(each, tokens["host"][0]) for each in made_this_way):
            raise ParityError(f"{way}, batch {len(prompts)}, {name}: other tokens than the host's")
    certain = _certain(backend, prompts, params, tokens["host"][0])
    return [
        {
            "settings": name,
            "batch_size": len(prompts),
            "way": way,
            "step_ms": asdict(found) if (found := summarise(step_ms[way])) else None,
            "choose_ms": asdict(found) if (found := summarise(choose_ms[way])) else None,
            "certain": certain if way == "graph" else None,
        }
        for way in WAYS
    ]


def _certain(
    backend: ChoosingBackend, prompts: list[list[int]], params: list[SamplingParams], made: Any
) -> float | None:
    """The share of `made`, [steps, rows], that the graph is certain of."""
    chooser = Chooser(prompts, params)
    state = backend.open(prompts, len(prompts[0]) + len(made))
    exact = []
    for step, tokens in enumerate(made):
        exact.append(backend.choose(state, chooser.request(step, backend.vocab_size)).exact)
        chooser.add(np.arange(len(prompts)), tokens)
        backend.advance(state, tokens)
    return float(np.mean(exact))


if __name__ == "__main__":
    run(main)
