"""transformers' GPT2LMHeadModel in eager torch: float32, or its matrices in int8 by torch's dynamic quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from benchmarks.peers.protocol import Clock, Job, Run, serve


class TorchContestant:
    """Fused attention, transformers' default cache, the head on the last position only."""

    notes = ()

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.model = GPT2LMHeadModel.from_pretrained(job.bundle, attn_implementation="sdpa", dtype=torch.float32).eval()
        if job.precision == "int8":
            for block in self.model.transformer.h:
                for layer in (block.attn, block.mlp):
                    for name, child in list(layer.named_children()):
                        if isinstance(child, Conv1D):
                            setattr(layer, name, _linear(child))
            self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, torch.qint8)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """See `Contestant.run`."""
        with torch.inference_mode():
            return self._run(prompts, new_tokens)

    def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        run, clock = Run(), Clock()
        output = self.model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        run.prefill = clock.lap()
        tokens = output.logits[:, -1].argmax(-1)
        run.tokens.append(tokens.tolist())
        for _ in range(new_tokens):
            clock.lap()
            output = self.model(input_ids=tokens[:, None], past_key_values=output.past_key_values, use_cache=True)
            run.steps.append(clock.lap())
            tokens = output.logits[:, -1].argmax(-1)
            run.tokens.append(tokens.tolist())
        return run


def _linear(layer: Any) -> torch.nn.Linear:
    """A Conv1D, whose matrix lies [in, out], as the Linear that torch knows how to quantise."""
    inputs, outputs = layer.weight.shape
    linear = torch.nn.Linear(inputs, outputs)
    linear.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous())
    linear.bias = layer.bias
    return linear


if __name__ == "__main__":
    serve(TorchContestant, ("torch", "transformers"))
