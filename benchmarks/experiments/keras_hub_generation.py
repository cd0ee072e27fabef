"""The KerasHub contestant: GPT2CausalLM's compiled generation, greedy, on TensorFlow.

Runs in the peers' environment: `python -m benchmarks.experiments.keras_hub_generation`.
Reads a line of JSON for each run (`batch`, `prompt`, `tokens`, `xla`) and answers with a line: seconds of the call that
`generate` makes of one batch.
The first run of each shape compiles it. Weights are KerasHub's random ones, of the 124M geometry.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import keras_hub
import numpy as np
import tensorflow as tf


def build(xla: bool) -> Any:
    """The model, set to greedy generation."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=50257, num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072,
        dropout=0.0, max_sequence_length=1024,
    )  # fmt: skip
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy", jit_compile=xla)
    return model


def main() -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever the libraries print does not belong among the answers.
    models: dict[bool, Any] = {}
    versions = {"keras_hub": keras_hub.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job["xla"] not in models:
            models.clear()
            models[job["xla"]] = build(job["xla"])
        generate = models[job["xla"]].make_generate_function()
        length = job["prompt"] + job["tokens"]
        ids = np.random.default_rng(0).integers(0, 250, (job["batch"], length)).astype(np.int32)
        mask = np.broadcast_to(np.arange(length) < job["prompt"], ids.shape)
        inputs = {"token_ids": tf.constant(np.where(mask, ids, 0)), "padding_mask": tf.constant(mask)}
        began = time.perf_counter()
        outputs = generate(inputs, stop_token_ids=None)
        made = int(np.sum(outputs["padding_mask"].numpy())) // job["batch"] - job["prompt"]
        seconds = time.perf_counter() - began
        assert made == job["tokens"], made
        print(json.dumps({"seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
