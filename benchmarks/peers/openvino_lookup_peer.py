"""OpenVINO GenAI with prompt lookup, its speculative decoding without a second model, on the graph of optimum-intel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import openvino_tokenizers
from transformers import AutoTokenizer

from benchmarks.common.static_batch import GenerateRunner, LoadRequest, converted, serve
from benchmarks.peers.openvino_peer import export

# As in OpenVINO GenAI's example of prompt lookup.
_DRAFTED, _NGRAM = 5, 3


class PromptLookup:
    """One pipeline. It decodes one prompt at a time."""

    def __init__(self, request: LoadRequest) -> None:
        folder = Path(request.work) / f"openvino-genai-{request.precision}"
        with converted(folder) as draft:
            if draft is not None:
                export(request, draft)
                # The pipeline does not open without a tokenizer, though it gets and gives ids here.
                parts = openvino_tokenizers.convert_tokenizer(
                    AutoTokenizer.from_pretrained(request.bundle), with_detokenizer=True
                )
                for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
                    openvino.save_model(part, draft / f"openvino_{name}.xml")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": request.threads}
        if request.precision == "fp32":
            options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", prompt_lookup=True, **options)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Return the greedy tokens of each row."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_new_tokens, True, False
        config.num_assistant_tokens, config.max_ngram_size = _DRAFTED, _NGRAM
        result = self.pipeline.generate(openvino.Tensor(np.array(prompts, np.int64)), config)
        return [list(row) for row in result.tokens]


def main() -> None:
    """Answer the parent until the input ends."""
    note = f"prompt lookup of {_DRAFTED} tokens by {_NGRAM}-grams"
    serve(
        lambda request: GenerateRunner(PromptLookup(request), (note,)),
        ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "nncf", "transformers"),
    )


if __name__ == "__main__":
    main()
