"""llama.cpp through llama-cpp-python's C interface, on the GGUF file that `gpt2-bundle export --gguf` writes.

With `--lookup`: llama-cpp-python's own loop with its prompt lookup, speculative decoding without a second model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import c_int32
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.common.static_batch import BatchRun, GenerateRunner, LoadRequest, Stopwatch, converted, serve
from serving.bundle import open_bundle
from serving.gguf import write_gguf

_TYPES = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}
# Its README recommends 2 drafted tokens on a processor without a GPU.
_DRAFTED = 2


def model_file(request: LoadRequest) -> Path:
    """The GGUF file of the bundle in the precision that is asked for, written unless it is there."""
    folder = Path(request.work) / f"llama-{request.precision}"
    with converted(folder) as draft:
        if draft is not None:
            bundle = open_bundle(Path(request.bundle), check="sizes")
            write_gguf(bundle, draft / "model.gguf", _TYPES[request.precision])
    return folder / "model.gguf"


class LlamaRunner:
    """One context whose sequences are the rows; every step is one `llama_decode` of all of them."""

    def __init__(self, request: LoadRequest) -> None:
        path = model_file(request)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = request.rows * -(-request.capacity // 256) * 256
        params.n_batch = params.n_ctx
        params.n_seq_max = request.rows
        params.n_threads = params.n_threads_batch = request.threads
        if request.precision == "fp32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
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


class PromptLookup:
    """One model. It decodes one prompt at a time."""

    def __init__(self, request: LoadRequest) -> None:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        cache = llama_cpp.GGML_TYPE_F32 if request.precision == "fp32" else llama_cpp.GGML_TYPE_F16
        self.model = llama_cpp.Llama(
            str(model_file(request)),
            n_ctx=-(-request.capacity // 256) * 256,
            n_threads=request.threads,
            n_threads_batch=request.threads,
            type_k=cache,
            type_v=cache,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=_DRAFTED),
            verbose=False,
        )

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Return the greedy tokens of the one row."""
        (prompt,) = prompts
        # Else what it kept of the prompt in the call before would not be read again.
        self.model.reset()
        return [list(islice(self.model.generate(list(prompt), temp=0.0), max_new_tokens))]


def _lookup(request: LoadRequest) -> GenerateRunner:
    note = f"prompt lookup of {_DRAFTED} tokens, in llama-cpp-python's own loop, sampling included"
    return GenerateRunner(PromptLookup(request), (note,))


if __name__ == "__main__":
    serve(_lookup if "--lookup" in sys.argv else LlamaRunner, ("llama_cpp_python", "numpy"))
