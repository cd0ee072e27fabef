"""The torch trainer: transformers' GPT2LMHeadModel with torch's fused AdamW, eager or compiled.

Runs in the peers' environment: `python -m benchmarks.training.torch_peer JOB.json [compile]`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.training.job import TrainingJob, batches, finish, rate, validation_rows


def make_model(job: TrainingJob) -> Any:
    """The model with the job's weights, in float32, with torch's scaled dot-product attention and no dropout."""
    options: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "attn_implementation": "sdpa"}
    if job.start:
        return GPT2LMHeadModel.from_pretrained(job.start, **options)
    sizes = {name: getattr(job, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes, **options))


def make_optimizer(model: Any, job: TrainingJob) -> Any:
    """Fused AdamW, the fastest of torch's three forms, that decays the blocks' matrices only."""
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".h." in name)]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(job.beta1, job.beta2), eps=job.epsilon, fused=True)


def train(job: TrainingJob, compiled: bool) -> None:
    """Take the job's steps, timing each, and print the result."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(job.seed)
    model = make_model(job)
    model.train()
    optimizer = make_optimizer(model, job)

    def loss_of(inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs, use_cache=False).logits
        return cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    step_loss = torch.compile(loss_of) if compiled else loss_of
    seconds, losses = [], []
    began = time.perf_counter()
    for step, rows in enumerate(batches(job)):
        for group in optimizer.param_groups:
            group["lr"] = rate(job, step)
        ids = torch.from_numpy(rows).long()
        optimizer.zero_grad()
        loss = step_loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    finish(seconds, validate(model, job) if job.validate else None, versions, losses=losses)


def validate(model: Any, job: TrainingJob) -> float:
    """Mean nats a token of the validation stream."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in validation_rows(job):
            ids = torch.from_numpy(row).long()
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            total += float(cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(row) - 1
    return total / count


if __name__ == "__main__":
    train(TrainingJob.read(Path(sys.argv[1])), "compile" in sys.argv[2:])
