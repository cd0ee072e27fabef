"""ONNX Runtime through `serving`: a graph step by step, multi-step or speculative, or the portable graph."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.common.static_batch import (
    BackendRunner,
    BatchRun,
    GenerateRunner,
    LoadRequest,
    NotedRunner,
    Stopwatch,
    serve,
)
from serving import SamplingParams, generation
from serving import load as load_model
from serving.backends.devices import parse_device
from serving.backends.onnx import OnnxBackend
from serving.backends.onnx_session import open_session
from serving.backends.prefill_graph import find_prefill_graph
from serving.bundle import open_bundle
from serving.errors import InputError


class MultiStepRunner:
    """`ort/PRECISION` by several steps a fetch; the seconds of a block are divided among its steps."""

    def __init__(self, backend: OnnxBackend, request: LoadRequest, device: str, steps: int) -> None:
        self.steps = steps
        self.loop: Any = backend.loop(sampled=False)
        if self.loop is None:
            raise InputError(f"ort/{request.precision} has no multi-step decode graph of {steps} steps on {device}")
        self.notes = [f"the time of a step is that of its block / {steps}"]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        run, watch = BatchRun(), Stopwatch()
        state = self.loop.open(prompts, len(prompts[0]) + new_tokens)
        blocks = [self.loop.run(state, 1, None, None)]
        run.prefill = watch.lap()
        for start in range(0, new_tokens, self.steps):
            count = min(self.steps, new_tokens - start)
            watch.lap()
            blocks.append(self.loop.run(state, count, None, None))
            run.steps += [watch.lap() / count] * count
        for block in blocks:
            # The loop marks a token that the host would settle among equals as -1 - token.
            run.tokens += [[token if token >= 0 else -1 - token for token in column] for column in block.T.tolist()]
        return run


class PortableRunner:
    """`onnx/portable`, whose standard operators run in 32 bits on any device; the KV cache stays on the device."""

    notes = ("the prefill is two calls: all but the last token, whose logits are not fetched, and the last token",)

    def __init__(self, request: LoadRequest, device: str) -> None:
        bundle = open_bundle(Path(request.bundle), check="sizes")
        graph = bundle.graph("onnx/portable")
        self.session = open_session(bundle, graph.path, device, request.threads)
        self.past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        self.shape = bundle.manifest.model.n_head, bundle.manifest.model.head_dim
        self.device = parse_device(device)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        run, ids, (heads, head_dim) = BatchRun(), np.array(prompts, np.int64), self.shape
        empty = np.zeros((len(prompts), heads, 0, head_dim), np.float32)
        watch = Stopwatch()
        caches = [ort.OrtValue.ortvalue_from_numpy(empty, *self.device) for _ in self.past]
        length = ids.shape[1] - 1
        if length:
            _, caches = self._step(ids[:, :-1], 0, caches, fetched=False)
        tokens = ids[:, -1]
        for step in range(new_tokens + 1):
            logits, caches = self._step(tokens[:, None], length + step, caches, fetched=True)
            if step:
                run.steps.append(watch.lap())
            else:
                run.prefill = watch.lap()
            tokens = logits.numpy()[:, -1].argmax(-1)
            run.tokens.append(tokens.tolist())
            watch.lap()
        return run

    def _step(self, ids: Any, cached: int, caches: list[Any], fetched: bool) -> tuple[Any, list[Any]]:
        rows, width = ids.shape
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", np.ones((rows, cached + width), np.int64))
        positions = np.broadcast_to(np.arange(cached, cached + width), ids.shape)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, cache in zip(self.past, caches, strict=True):
            binding.bind_ortvalue_input(name, cache)
        binding.bind_output("logits", *(("cpu", 0) if fetched else self.device))
        for name in self.past:
            binding.bind_output(name.replace("past_key_values", "present"), *self.device)
        self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits, present


class Speculative:
    """`ort/PRECISION` with the drafts of `serving.load`, which decodes one prompt at a time so."""

    def __init__(self, request: LoadRequest) -> None:
        self.model = load_model(request.bundle, graph=f"ort/{request.precision}", speculation="on")

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Return the greedy tokens of each row."""
        params, eos = SamplingParams(max_new_tokens, ignore_eos=True), self.model.bundle.manifest.model.eos_token_id
        return [list(each.token_ids) for each in generation.generate(self.model.backend, prompts, params, eos)]


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=0, help="steps a fetch; 0 fetches the logits of each step")
    parser.add_argument("--graphs", action="store_true", help="by CUDA graphs")
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--speculation", action="store_true")
    given = parser.parse_args()

    def load(request: LoadRequest) -> NotedRunner:
        if given.portable:
            return PortableRunner(request, given.device)
        if given.speculation:
            return GenerateRunner(Speculative(request), ("drafts from the prompt and the bundle's n-gram table",))
        bundle, graph = open_bundle(Path(request.bundle), check="sizes"), f"ort/{request.precision}"
        # On the CPU the runtime's own default is measured, as `gpt2-bundle serve` uses it.
        threads = None if given.device == "cpu" and not given.steps else request.threads
        if given.steps:
            backend = OnnxBackend(bundle, graph, threads, given.device, given.steps, given.graphs)
            return MultiStepRunner(backend, request, given.device, given.steps)
        # As `gpt2-bundle serve` would.
        prefill_graph = find_prefill_graph(bundle, graph, device=given.device)
        backend = OnnxBackend(bundle, graph, threads, given.device, prefill_graph=prefill_graph)
        return BackendRunner(backend, () if prefill_graph is None else (f"{prefill_graph} prefills the prompts",))

    serve(load, ("gpt2-bundle", "onnxruntime", "onnxruntime-gpu", "numpy"))


if __name__ == "__main__":
    main()
