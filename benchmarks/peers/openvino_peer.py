"""OpenVINO's runtime on the stateful graph that optimum-intel exports, weights compressed by nncf.

The head is cut to the last position before it is compiled, as OpenVINO GenAI does; optimum's graph gives all of them.
With `--lookup`: OpenVINO GenAI's pipeline with prompt lookup, speculative decoding without a second model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from benchmarks.common.static_batch import BatchRun, GenerateRunner, LoadRequest, Stopwatch, converted, serve

_QUANTIZATION: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}
# As in OpenVINO GenAI's example of prompt lookup.
_DRAFTED, _NGRAM = 5, 3
_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class OpenVINORunner:
    """Latency hint; float32 arithmetic at fp32, and at fewer bits whatever OpenVINO chooses for this processor."""

    def __init__(self, request: LoadRequest) -> None:
        folder = Path(request.work) / f"openvino-{request.precision}"
        with converted(folder) as draft:
            if draft is not None:
                export(request, draft)
        core = openvino.Core()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": request.threads}
        options |= _FP32 if request.precision == "fp32" else {}
        model = core.read_model(folder / "openvino_model.xml")
        _keep_last_position(model)
        compiled = core.compile_model(model, "CPU", options)
        self.inputs = {name for port in compiled.inputs for name in port.get_names()}
        self.request = compiled.create_infer_request()
        chosen = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        self.notes = tuple(f"{name} {_told(compiled.get_property(name))}" for name in chosen)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        self.request.reset_state()
        run, ids = BatchRun(), np.array(prompts, np.int64)
        for step in range(new_tokens + 1):
            watch = Stopwatch()
            logits = self._step(ids, run_length=len(prompts[0]) + step)
            seconds = watch.lap()
            if step:
                run.steps.append(seconds)
            else:
                run.prefill = seconds
            ids = logits[:, -1].argmax(-1)[:, None]
            run.tokens.append(ids[:, 0].tolist())
        return run

    def _step(self, ids: Any, run_length: int) -> Any:
        rows, width = ids.shape
        positions = np.broadcast_to(np.arange(run_length - width, run_length), ids.shape)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, run_length), np.int64),
            "position_ids": np.ascontiguousarray(positions),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self.request.infer({name: value for name, value in feeds.items() if name in self.inputs}, share_inputs=True)
        return self.request.get_output_tensor(0).data


def export(request: LoadRequest, folder: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    settings = _QUANTIZATION.get(request.precision)
    quantization = OVWeightQuantizationConfig(**settings) if settings else None
    options: dict[str, Any] = {"quantization_config": quantization} if quantization else {"load_in_8bit": False}
    model = OVModelForCausalLM.from_pretrained(request.bundle, export=True, compile=False, **options)
    model.save_pretrained(folder)


def _keep_last_position(model: Any) -> None:
    """Gather the last position before the product that ends in the logits."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input_value(0)
    last = opset13.gather(hidden, np.array([-1], np.int64), np.array(1, np.int64))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def _told(value: Any) -> str:
    return value.to_string() if hasattr(value, "to_string") else str(value)


class PromptLookup:
    """One pipeline. It decodes one prompt at a time."""

    def __init__(self, request: LoadRequest) -> None:
        import openvino_genai
        import openvino_tokenizers
        from transformers import AutoTokenizer

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
        options |= _FP32 if request.precision == "fp32" else {}
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", prompt_lookup=True, **options)
        self.config = openvino_genai.GenerationConfig()
        self.config.ignore_eos, self.config.do_sample = True, False
        self.config.num_assistant_tokens, self.config.max_ngram_size = _DRAFTED, _NGRAM

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Return the greedy tokens of each row."""
        self.config.max_new_tokens = max_new_tokens
        result = self.pipeline.generate(openvino.Tensor(np.array(prompts, np.int64)), self.config)
        return [list(row) for row in result.tokens]


def _lookup(request: LoadRequest) -> GenerateRunner:
    return GenerateRunner(PromptLookup(request), (f"prompt lookup of {_DRAFTED} tokens by {_NGRAM}-grams",))


if __name__ == "__main__":
    packages = ("openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf", "transformers", "torch")
    serve(_lookup if "--lookup" in sys.argv else OpenVINORunner, packages)
