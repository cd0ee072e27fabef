"""llama-cpp-python with its prompt lookup, speculative decoding without a second model, on the file of `llama_peer`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from benchmarks.common.static_batch import GenerateRunner, LoadRequest, serve
from benchmarks.peers.llama_peer import model_file

# Its README recommends 2 tokens on a processor without a GPU.
_DRAFTED = 2


class PromptLookup:
    """One model. It decodes one prompt at a time."""

    def __init__(self, request: LoadRequest) -> None:
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


def main() -> None:
    """Answer the parent until the input ends."""
    note = f"prompt lookup of {_DRAFTED} tokens, in llama-cpp-python's own loop, sampling included"
    serve(lambda request: GenerateRunner(PromptLookup(request), (note,)), ("llama_cpp_python", "numpy"))


if __name__ == "__main__":
    main()
