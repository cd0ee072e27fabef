"""ONNX Runtime: a graph of the bundle step by step, or the loop on the device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Clock, Job, Run, serve
from serving.backends.onnx import OnnxBackend
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
        return (
            self._run_steps(prompts, new_tokens, capacity)
            if self.loop is None
            else self._run_loop(prompts, new_tokens, capacity)
        )

    def _run_steps(self, prompts: Sequence[Sequence[int]], new_tokens: int, capacity: int) -> Run:
        run, clock = Run(), Clock()
        state, logits = self.backend.prefill(prompts, capacity)
        run.prefill = clock.lap()
        tokens = logits.argmax(-1)
        run.tokens.append(tokens.tolist())
        for _ in range(new_tokens):
            clock.lap()
            logits = self.backend.decode(state, tokens)
            run.steps.append(clock.lap())
            tokens = logits.argmax(-1)
            run.tokens.append(tokens.tolist())
        return run

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


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--graphs", action="store_true")
    given = parser.parse_args()
    packages = ("gpt2-bundle", "onnxruntime", "onnxruntime-gpu", "numpy")
    serve(lambda job: OnnxContestant(job, given.device, given.loop, given.steps, given.graphs), packages)


if __name__ == "__main__":
    main()
