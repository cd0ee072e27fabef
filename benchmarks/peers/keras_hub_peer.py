"""KerasHub's GPT2CausalLM on TensorFlow: its compiled generation, greedy, by XLA or by tf.function alone.

KerasHub generates in the graph and tells of no token before the last, so that a step is a difference of calls.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras_hub
import numpy as np
import tensorflow as tf

from benchmarks.common.static_batch import BatchRun, LoadRequest, Stopwatch, converted, serve


class KerasHubRunner:
    """The prefill is a call for one token; a step is what a call for many takes longer, over the tokens it adds."""

    notes = (
        "a step is (a call for all tokens - a call for one) / steps; each shape is compiled by XLA and by tf.function, "
        "and the faster of the two counts",
    )

    def __init__(self, request: LoadRequest) -> None:
        tf.config.threading.set_intra_op_parallelism_threads(request.threads)
        folder = Path(request.work) / "keras_hub"
        with converted(folder) as draft:
            if draft is not None:
                _describe(Path(request.bundle), draft)
        backbone = keras_hub.models.GPT2Backbone.from_preset(str(folder), dtype="float32")
        self.models = {}
        for xla in (True, False):
            self.models[xla] = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
            self.models[xla].compile(sampler="greedy", jit_compile=xla)
        self.faster: dict[tuple[int, int], bool] = {}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        run = BatchRun()
        run.prefill, _ = self._call(prompts, 1)
        whole, tokens = self._call(prompts, 1 + new_tokens)
        run.steps = [max(whole - run.prefill, 0.0) / new_tokens] if new_tokens else []
        run.tokens = tokens
        return run

    def _call(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[float, list[list[int]]]:
        """Seconds of one generation of `count` tokens, and these: [count][rows]."""
        rows, asked = len(prompts), len(prompts[0])
        shape = rows, asked + count
        ids = np.zeros(shape, np.int32)
        ids[:, :asked] = prompts
        inputs = {
            "token_ids": tf.constant(ids),
            "padding_mask": tf.constant(np.broadcast_to(np.arange(asked + count) < asked, shape)),
        }
        if shape not in self.faster:
            seconds = {}
            for xla in self.models:
                self._generate(xla, inputs)
                seconds[xla] = self._generate(xla, inputs)[0]
            self.faster[shape] = min(seconds, key=lambda xla: seconds[xla])
        passed, made = self._generate(self.faster[shape], inputs)
        return passed, made[:, asked:].T.tolist()

    def _generate(self, xla: bool, inputs: dict[str, Any]) -> tuple[float, Any]:
        watch = Stopwatch()
        # What `generate` calls for each batch, without its tokenizer; no token ends a text.
        made = self.models[xla].make_generate_function()(inputs, stop_token_ids=None)["token_ids"].numpy()
        return watch.lap(), made


def _describe(bundle: Path, folder: Path) -> None:
    """The Hugging Face model that KerasHub reads, whose config must name what transformers would take as read."""
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0.0}), encoding="utf-8")
    (folder / "model.safetensors").symlink_to((bundle / "model.safetensors").resolve())


if __name__ == "__main__":
    serve(KerasHubRunner, ("keras-hub", "keras", "tensorflow"))
