"""OpenVINO's runtime on the stateful graph that optimum-intel exports, weights compressed by nncf.

The head is cut to the last position before it is compiled, as OpenVINO GenAI does; optimum's graph gives all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from benchmarks.common.static_batch import BatchRun, LoadRequest, Stopwatch, converted, serve

_QUANTIZATION: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}


class OpenVINORunner:
    """Latency hint; float32 arithmetic at fp32, and at fewer bits whatever OpenVINO chooses for this processor."""

    def __init__(self, request: LoadRequest) -> None:
        folder = Path(request.work) / f"openvino-{request.precision}"
        with converted(folder) as draft:
            if draft is not None:
                export(request, draft)
        core = openvino.Core()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": request.threads}
        if request.precision == "fp32":
            options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
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


if __name__ == "__main__":
    serve(OpenVINORunner, ("openvino", "optimum-intel", "nncf", "transformers", "torch"))
