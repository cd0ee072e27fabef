"""llama.cpp through llama-cpp-python's C interface, on a GGUF file written with the gguf package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int32
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

from benchmarks.common.static_batch import BatchRun, LoadRequest, Stopwatch, converted, serve

TYPES = {
    "fp32": gguf.GGMLQuantizationType.F32,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OUTER = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


class LlamaRunner:
    """One context whose sequences are the rows; every step is one `llama_decode` of all of them."""

    def __init__(self, request: LoadRequest) -> None:
        folder = Path(request.work) / f"llama-{request.precision}"
        with converted(folder) as draft:
            if draft is not None:
                write_gguf(Path(request.bundle), draft / "model.gguf", TYPES[request.precision])
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), model_params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = request.rows * -(-request.capacity // 256) * 256
        params.n_batch = params.n_ctx
        params.n_seq_max = request.rows
        params.n_threads = params.n_threads_batch = request.threads
        if request.precision == "fp32":
            params.type_k = params.type_v = int(gguf.GGMLQuantizationType.F32)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.notes = (f"caches in {'f32' if request.precision == 'fp32' else 'f16'}",)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        run, watch = BatchRun(), Stopwatch()
        logits = self._decode(prompts, 0)
        run.prefill = watch.lap()
        run.tokens.append([int(row.argmax()) for row in logits])
        for step in range(new_tokens):
            watch.lap()
            logits = self._decode([[token] for token in run.tokens[-1]], len(prompts[0]) + step)
            run.steps.append(watch.lap())
            run.tokens.append([int(row.argmax()) for row in logits])
        return run

    def _decode(self, rows: Sequence[Sequence[int]], start: int) -> list[Any]:
        """Append tokens to every row, and return views of the logits after each row's last, [vocabulary] each."""
        width = len(rows[0])
        batch = llama_cpp.llama_batch_init(len(rows) * width, 0, 1)
        batch.n_tokens = len(rows) * width
        last = []
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                place = row * width + offset
                batch.token[place], batch.pos[place] = token, start + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = offset == width - 1
            last.append(row * width + width - 1)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        pointers = [llama_cpp.llama_get_logits_ith(self.context, c_int32(place)) for place in last]
        return [np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)) for pointer in pointers]


def write_gguf(bundle: Path, path: Path, kind: Any, describe: Callable[[Any], None] | None = None) -> None:
    """Write a Hugging Face GPT-2 folder as GGUF: matrices in `kind`, everything else in float32.

    `describe` writes the vocabulary by the writer that it is given; without it there is none.
    """
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    if describe is None:
        writer.add_tokenizer_model("none")
    else:
        describe(writer)
    for name, tensor in _tensors(bundle / "model.safetensors"):
        if tensor.ndim == 2 and "position" not in name:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Each tensor under GGUF's name; the blocks' matrices are stored [in, out] and turned to GGUF's [out, in]."""
    with safe_open(path, framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            parts = key.removeprefix("transformer.").split(".")
            tensor = np.ascontiguousarray(tensors.get_tensor(key))
            if parts[0] == "h":
                name = f"blk.{parts[1]}.{_BLOCK['.'.join(parts[2:-1])]}.{parts[-1]}"
                tensor = np.ascontiguousarray(tensor.T) if tensor.ndim == 2 else tensor
            else:
                name = f"{_OUTER[parts[0]]}.{parts[-1]}"
            yield name, tensor


if __name__ == "__main__":
    serve(LlamaRunner, ("llama_cpp_python", "gguf", "numpy"))
