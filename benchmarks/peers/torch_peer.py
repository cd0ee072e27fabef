"""transformers' GPT2LMHeadModel in torch: eager in float32, float16 or int8, or compiled with a static cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.common.static_batch import BatchRun, LoadRequest, Stopwatch, serve


class TorchRunner:
    """Fused attention (sdpa), the head on the last position only; the next token stays on the device.

    int8 is torch's dynamic quantization of the matrices, on the CPU only.
    """

    def __init__(self, request: LoadRequest, device: str, compiled: bool) -> None:
        # Imported here, so that a missing package is answered as a line.
        import torch
        from transformers import GPT2LMHeadModel, StaticCache

        self.torch, self.device, self.compiled, self.static = torch, device, compiled, StaticCache
        if device == "cpu":
            torch.set_num_threads(request.threads)
        dtype = torch.float16 if request.precision == "fp16" else torch.float32
        model = GPT2LMHeadModel.from_pretrained(request.bundle, attn_implementation="sdpa", dtype=dtype)
        self.model: Any = model.eval().to(device)
        if request.precision == "int8":
            self.model = _quantized(torch, self.model)
        self.step: Any = self.model
        self.caches: dict[tuple[int, int], Any] = {}
        if compiled:
            # At most one compilation for each batch size; past the limit torch would continue uncompiled.
            torch._dynamo.config.recompile_limit = 64
            self.step = torch.compile(self.model, mode="reduce-overhead")
        self.notes = ["compiled by mode reduce-overhead; the prefill is not compiled"] if compiled else []

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        with self.torch.inference_mode():
            return self._run(prompts, new_tokens)

    def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        torch, run, length = self.torch, BatchRun(), len(prompts[0])
        token_ids = torch.tensor(prompts, device=self.device)
        cache = self._cache(len(prompts), length + new_tokens) if self.compiled else None
        self._wait()
        watch = Stopwatch()
        output = self._forward(self.model, token_ids, cache, torch.arange(length, device=self.device))
        tokens = output.logits[:, -1].argmax(-1)
        self._wait()
        run.prefill = watch.lap()
        chosen, cache = [tokens], output.past_key_values
        for step in range(new_tokens):
            watch.lap()
            positions = torch.full((1,), length + step, device=self.device)
            tokens = self._forward(self.step, tokens[:, None], cache, positions).logits[:, -1].argmax(-1).clone()
            self._wait()
            run.steps.append(watch.lap())
            chosen.append(tokens)
        run.tokens = torch.stack(chosen).tolist()
        return run

    def _cache(self, rows: int, capacity: int) -> Any:
        """Return an empty static cache, the same one for each run of a shape: a captured step holds its addresses."""
        cache = self.caches.get((rows, capacity))
        if cache is None:
            # Those of other batch sizes are not used again, and take memory.
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


def _quantized(torch: Any, model: Any) -> Any:
    """Make each Conv1D, whose matrix is [in, out], a Linear, which torch knows how to quantize."""
    from transformers.pytorch_utils import Conv1D

    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):
            for name, child in list(layer.named_children()):
                if isinstance(child, Conv1D):
                    linear = torch.nn.Linear(*child.weight.shape)
                    linear.weight = torch.nn.Parameter(child.weight.detach().t().contiguous())
                    linear.bias = child.bias
                    setattr(layer, name, linear)
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)


def main() -> None:
    """Answer the parent until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    serve(lambda request: TorchRunner(request, given.device, given.compile), ("torch", "transformers", "triton"))


if __name__ == "__main__":
    main()
