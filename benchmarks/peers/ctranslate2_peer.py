"""CTranslate2's Generator on the model that its own converter makes of the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.converters import TransformersConverter

from benchmarks.common.static_batch import BatchRun, LoadRequest, Stopwatch, converted, serve

_COMPUTE = {"fp32": "float32", "int8": "int8"}


class CTranslate2Runner:
    """Its interface is whole generations, which tell of each token as it is made: the last row's ends a step."""

    notes = ("times are between the tokens that generate_batch reports: its own choice of token is in them",)

    def __init__(self, request: LoadRequest) -> None:
        folder = Path(request.work) / f"ctranslate2-{request.precision}"
        with converted(folder) as draft:
            if draft is not None:
                _Converter(request.bundle).convert(str(draft), quantization=_COMPUTE[request.precision], force=True)
        self.generator = ctranslate2.Generator(
            str(folder), compute_type=_COMPUTE[request.precision], inter_threads=1, intra_threads=request.threads
        )
        self.words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        run, watch, rows = BatchRun(), Stopwatch(), len(prompts)
        seconds: list[float] = []
        tokens: list[dict[int, int]] = [{} for _ in range(new_tokens + 1)]

        def told(result: Any) -> bool:
            tokens[result.step][result.batch_id] = result.token_id
            if len(tokens[result.step]) == rows:
                seconds.append(watch.lap())
            return False

        self.generator.generate_batch(
            [[self.words[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens + 1,
            min_length=new_tokens + 1,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=0,
            callback=told,
        )
        run.prefill, run.steps = seconds[0], seconds[1:]
        run.tokens = [[row[index] for index in range(rows)] for row in tokens]
        return run


class _Converter(TransformersConverter):  # type: ignore[misc]
    """Gives a name to every row of the table: the model may have more of them than its tokenizer has entries."""

    def load_tokenizer(self, tokenizer_class: Any, name: str, **options: Any) -> Any:
        tokenizer = super().load_tokenizer(tokenizer_class, name, **options)
        rows = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        tokenizer.add_tokens([f"<unused {row}>" for row in range(len(tokenizer), rows)])
        return tokenizer


if __name__ == "__main__":
    serve(CTranslate2Runner, ("ctranslate2", "transformers", "torch"))
