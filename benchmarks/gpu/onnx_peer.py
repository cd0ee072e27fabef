"""ONNX Runtime: a graph of the bundle step by step, or the loop on the device, or the portable graph."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.peers.bundle_peer import run_greedy
from benchmarks.peers.protocol import Clock, Contestant, Job, Run, serve
from serving.backends.devices import parse_device
from serving.backends.onnx import OnnxBackend
from serving.backends.onnx_session import open_session
from serving.bundle import open_bundle
from serving.errors import InputError


class OnnxContestant:
    """`ort/PRECISION`; where the loop is asked for, a block's seconds are divided among its steps."""

    def __init__(self, job: Job, device: str, loop: bool, steps: int, graphs: bool) -> None:
        bundle = open_bundle(Path(job.bundle), check="sizes")
        self.backend = OnnxBackend(
            bundle, f"ort/{job.precision}", job.threads, device, steps_per_fetch=steps, cuda_graphs=graphs
        )
        self.steps = steps
        self.loop: Any = self.backend.loop(sampled=False) if loop else None
        if loop and self.loop is None:
            raise InputError(f"there is no loop for ort/{job.precision} of {steps} steps a fetch on {device}")
        self.notes = [f"a figure of a step is its block's over {steps}"] if loop else []

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """See `Contestant.run`."""
        capacity = len(prompts[0]) + new_tokens
        if self.loop is None:
            return run_greedy(self.backend, prompts, new_tokens, capacity)
        return self._run_loop(prompts, new_tokens, capacity)

    def _run_loop(self, prompts: Sequence[Sequence[int]], new_tokens: int, capacity: int) -> Run:
        run, clock = Run(), Clock()
        state = self.loop.open(prompts, capacity)
        block = self.loop.run(state, 1, None, None)
        run.prefill = clock.lap()
        columns = [block]
        for began in range(0, new_tokens, self.steps):
            count = min(self.steps, new_tokens - began)
            clock.lap()
            columns.append(self.loop.run(state, count, None, None))
            run.steps += [clock.lap() / count] * count
        for block in columns:
            # The loop marks a token that the host would settle among equals as -1 - token.
            run.tokens += [[token if token >= 0 else -1 - token for token in column] for column in block.T.tolist()]
        return run


class PortableContestant:
    """`onnx/portable`, whose standard operators run in 32 bits on any device; caches stay where they are made."""

    notes = ("the prefill is two calls: all but the last token, whose logits are not fetched, and the last one",)

    def __init__(self, job: Job, device: str) -> None:
        bundle = open_bundle(Path(job.bundle), check="sizes")
        graph = bundle.graph("onnx/portable")
        self.session = open_session(bundle, graph.path, device, job.threads)
        self.past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        self.shape = bundle.manifest.model.n_head, bundle.manifest.model.head_dim
        self.device = device

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """See `Contestant.run`."""
        run, ids, (heads, head_dim) = Run(), np.array(prompts, np.int64), self.shape
        empty = np.zeros((len(prompts), heads, 0, head_dim), np.float32)
        clock = Clock()
        caches = [ort.OrtValue.ortvalue_from_numpy(empty, *parse_device(self.device)) for _ in self.past]
        length = ids.shape[1] - 1
        if length:
            _, caches = self._step(ids[:, :-1], 0, caches, fetched=False)
        tokens = ids[:, -1]
        for step in range(new_tokens + 1):
            logits, caches = self._step(tokens[:, None], length + step, caches, fetched=True)
            if step:
                run.steps.append(clock.lap())
            else:
                run.prefill = clock.lap()
            tokens = logits.numpy()[:, -1].argmax(-1)
            run.tokens.append(tokens.tolist())
            clock.lap()
        return run

    def _step(self, ids: Any, before: int, caches: list[Any], fetched: bool) -> tuple[Any, list[Any]]:
        rows, width = ids.shape
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", np.ones((rows, before + width), np.int64))
        positions = np.broadcast_to(np.arange(before, before + width), ids.shape)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, cache in zip(self.past, caches, strict=True):
            binding.bind_ortvalue_input(name, cache)
        kind, number = parse_device(self.device)
        binding.bind_output("logits", *(("cpu", 0) if fetched else (kind, number)))
        for name in self.past:
            binding.bind_output(name.replace("past_key_values", "present"), kind, number)
        self.session.run_with_iobinding(binding)
        logits, *made = binding.get_outputs()
        return logits, made


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--portable", action="store_true")
    given = parser.parse_args()
    packages = ("gpt2-bundle", "onnxruntime", "onnxruntime-gpu", "numpy")

    def load(job: Job) -> Contestant:
        if given.portable:
            return PortableContestant(job, given.device)
        return OnnxContestant(job, given.device, given.loop, given.steps, given.graphs)

    serve(load, packages)


if __name__ == "__main__":
    main()
