"""ONNX Runtime GenAI on the bundle's own graphs: its model builder knows no GPT-2, so its loop is what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai

from benchmarks.common.static_batch import BatchRun, LoadRequest, Stopwatch, serve


class GenAIRunner:
    """`ort/PRECISION` in a Generator, greedily."""

    notes = ("runs this bundle's graph", "a step's time holds its choice of token; the logits stay inside")

    def __init__(self, request: LoadRequest) -> None:
        self.model = onnxruntime_genai.Model(str(Path(request.bundle) / "ort" / request.precision))

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        length = len(prompts[0]) + new_tokens + 1
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(batch_size=len(prompts), min_length=length, max_length=length, do_sample=False)
        run, watch = BatchRun(), Stopwatch()
        generator = onnxruntime_genai.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        run.prefill = watch.lap()
        generator.generate_next_token()  # Chooses from the prefill's logits; every later call runs the model first.
        run.tokens.append(generator.get_next_tokens().tolist())
        for _ in range(new_tokens):
            watch.lap()
            generator.generate_next_token()
            run.steps.append(watch.lap())
            run.tokens.append(generator.get_next_tokens().tolist())
        return run


if __name__ == "__main__":
    serve(GenAIRunner, ("onnxruntime-genai", "onnxruntime", "numpy"))
