"""transformers' GPT2LMHeadModel on a GPU: eager, or compiled with a static cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.protocol import Clock, Job, Run, serve


class TorchContestant:
    """Fused attention (sdpa); the chosen token stays on the device, and each step is waited for."""

    def __init__(self, job: Job, device: str, compiled: bool) -> None:
        # Inside, so that a missing package is answered as a line.
        import torch
        from transformers import GPT2LMHeadModel, StaticCache

        self.torch, self.device, self.compiled, self.static = torch, device, compiled, StaticCache
        if device == "cpu":
            torch.set_num_threads(job.threads)
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[job.precision]
        model = GPT2LMHeadModel.from_pretrained(job.bundle, attn_implementation="sdpa", dtype=dtype)
        self.model: Any = model.eval().to(device)
        self.step: Any = self.model
        self.caches: dict[tuple[int, int], Any] = {}
        if compiled:
            # A compilation for each batch size at most; past the limit torch would go on uncompiled.
            torch._dynamo.config.recompile_limit = 64
            self.step = torch.compile(self.model, mode="reduce-overhead")
        self.notes = ["compiled by mode reduce-overhead; the prefill is not compiled"] if compiled else []

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """See `Contestant.run`."""
        with self.torch.inference_mode():
            return self._run(prompts, new_tokens)

    def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        torch, run = self.torch, Run()
        length = len(prompts[0])
        token_ids = torch.tensor(prompts, device=self.device)
        cache: Any = None
        if self.compiled:
            cache = self._cache(len(prompts), length + new_tokens)
        self._wait()
        clock = Clock()
        positions = torch.arange(length, device=self.device)
        output = self._forward(self.model, token_ids, cache, positions)
        tokens = output.logits[:, -1].argmax(-1)
        self._wait()
        run.prefill = clock.lap()
        chosen = [tokens]
        cache = output.past_key_values
        for step in range(new_tokens):
            clock.lap()
            positions = torch.full((1,), length + step, device=self.device)
            tokens = self._forward(self.step, tokens[:, None], cache, positions).logits[:, -1].argmax(-1).clone()
            self._wait()
            run.steps.append(clock.lap())
            chosen.append(tokens)
        run.tokens = torch.stack(chosen).tolist()
        return run

    def _cache(self, rows: int, capacity: int) -> Any:
        """An empty static cache, the same one for each run of a shape, as a captured step holds its addresses."""
        cache = self.caches.get((rows, capacity))
        if cache is None:
            # Those of other batch sizes are not asked for again, and take memory.
            self.caches.clear()
            cache = self.caches[rows, capacity] = self.static(config=self.model.config, max_cache_len=capacity)
        cache.reset()
        return cache

    def _forward(self, model: Any, token_ids: Any, cache: Any, positions: Any) -> Any:
        return model(
            input_ids=token_ids,
            past_key_values=cache,
            position_ids=positions[None].expand(len(token_ids), -1),
            use_cache=True,
            logits_to_keep=1,
        )

    def _wait(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    serve(lambda job: TorchContestant(job, given.device, given.compile), ("torch", "transformers", "triton"))


if __name__ == "__main__":
    main()
