"""This project's own contestant: a graph of the bundle through `serving`, as any client would run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.protocol import Clock, Job, Run, serve
from serving.backends.base import Backend
from serving.backends.loader import load_backend
from serving.bundle import open_bundle


class BundleContestant:
    """`ort/PRECISION` in ONNX Runtime."""

    notes = ()

    def __init__(self, job: Job) -> None:
        bundle = open_bundle(Path(job.bundle), check="sizes")
        self.backend = load_backend(bundle, "onnx", f"ort/{job.precision}")

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """See `Contestant.run`."""
        return run_greedy(self.backend, prompts, new_tokens, len(prompts[0]) + new_tokens)


def run_greedy(backend: Backend, prompts: Sequence[Sequence[int]], new_tokens: int, capacity: int) -> Run:
    """`new_tokens` steps of `backend` behind `prompts`, each token the likeliest, as `Contestant.run` gives them."""
    run, clock = Run(), Clock()
    state, logits = backend.prefill(prompts, capacity)
    run.prefill = clock.lap()
    tokens = logits.argmax(-1)
    run.tokens.append(tokens.tolist())
    for _ in range(new_tokens):
        clock.lap()
        logits = backend.decode(state, tokens)
        run.steps.append(clock.lap())
        tokens = logits.argmax(-1)
        run.tokens.append(tokens.tolist())
    return run


if __name__ == "__main__":
    serve(BundleContestant, ("gpt2-bundle", "onnxruntime", "onnxruntime-gpu", "numpy"))
