"""Structured output: what a mask costs, and tokens per second of streams that follow a schema beside free ones.

`python -m benchmarks.serving.structured_output BUNDLE --graph ort/int8 --streams 16` prints one JSON record. Masks are
computed one at a time, in texts that are drawn from what each grammar allows. Then the same streams run freely and
under the schema, in turns, by the engine, all with as many tokens.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import Tokenizer

from benchmarks.common.engine_stream import Stream
from benchmarks.common.held_out_text import cut_prompts, read_text
from benchmarks.common.standalone import measurement, run, say
from benchmarks.common.statistics import paired, percentiles, summarise
from serving.bundle import Bundle
from serving.engine.api import GenerationRequest
from serving.engine.engine import SlotEngine, open_engine
from serving.sampling import SamplingParams
from serving.sampling.constraints import Grammar, StructuredOutput
from serving.sampling.detokenizer import load_tokenizer
from serving.sampling.grammars import GrammarCompiler

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.(com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "email", "tags", "active"],
    "additionalProperties": False,
}
_PEOPLE = {"type": "array", "items": _PERSON, "minItems": 1000}
GRAMMARS = {
    "schema": StructuredOutput("json_schema", json.dumps(_PEOPLE)),
    "any object": StructuredOutput("json_object"),
    "regex": StructuredOutput("regex", r"\d{4}-\d{2}-\d{2} [A-Z][a-z]{2,12} [A-Z][a-z]{2,12} \+\d{8,12}"),
    "choice": StructuredOutput("choice", choices=tuple(f"answer number {index}" for index in range(200))),
}


@measurement(
    click.option(
        "--tokenizer",
        type=click.Path(exists=True, path_type=Path),
        metavar="FILE",
        help="A tokenizer.json of the graph's vocabulary, in place of the bundle's.",
    ),
    streams=16, prompt_tokens=32, new_tokens=96, repeats=9, masks=4000,
)  # fmt: skip
def main(
    bundle: Bundle, graph: str, tokenizer: Path | None, streams: int, prompt_tokens: int, new_tokens: int,
    repeats: int, masks: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure on the folder BUNDLE; at most as many --streams as the engine has slots."""
    geometry = bundle.manifest.model
    began = time.perf_counter()
    chosen = load_tokenizer(bundle) if tokenizer is None else Tokenizer.from_file(str(tokenizer))
    compiler = GrammarCompiler(chosen, geometry.vocab_size, geometry.eos_token_id)
    record: dict[str, Any] = {
        "vocab_size": geometry.vocab_size,
        "tokenizer_entries": chosen.get_vocab_size(),
        "tokenizer_seconds": time.perf_counter() - began,
        "masks": {name: _masks(compiler, wanted, masks) for name, wanted in GRAMMARS.items()},
        "throughput": [],
    }
    say(record["masks"])
    prompts = cut_prompts(read_text(bundle), streams, prompt_tokens)
    grammar = compiler.compile(GRAMMARS["schema"])
    engine = open_engine(bundle, graph)
    try:
        for temperature in (0.0, 1.0):
            params = {"temperature": temperature, "max_new_tokens": new_tokens}
            record["throughput"].append(_throughput(engine, prompts, grammar, params, repeats))
            say(record["throughput"][-1])
    finally:
        engine.close()
    return record


def _masks(compiler: GrammarCompiler, wanted: StructuredOutput, count: int) -> dict[str, Any]:
    """Microseconds of a mask as the library makes it, of that and its form for sampling, and of taking a token."""
    began = time.perf_counter()
    grammar = compiler.compile(wanted)
    compile_seconds = time.perf_counter() - began
    draw = np.random.default_rng(0)
    words = np.zeros(-(-compiler.vocab_size // 32), np.uint32)
    place = (words.ctypes.data, words.nbytes)
    bare: list[float] = []
    whole: list[float] = []
    accept: list[float] = []
    allowed: list[int] = []
    constraint = grammar.start()
    while len(whole) < count:
        if not constraint.ready:
            # The library's own part is timed on a copy, since a second mask in one state would come from its cache.
            copy = constraint._matcher.deep_copy()
            began = time.perf_counter()
            copy.unsafe_compute_mask_ptr(*place)
            bare.append((time.perf_counter() - began) * 1e6)
        began = time.perf_counter()
        constraint.compute()
        whole.append((time.perf_counter() - began) * 1e6)
        may_follow = constraint.allowed()
        allowed.append(may_follow.count)
        token = int(draw.choice(may_follow.ids))
        began = time.perf_counter()
        constraint.accept(token)
        accept.append((time.perf_counter() - began) * 1e6)
        if constraint.done or token == compiler.eos_token_id:
            constraint = grammar.start()
    return {
        "compile_ms": compile_seconds * 1e3,
        "allowed_median": float(np.median(allowed)),
        "mask_us": percentiles(bare),
        "mask_and_form_us": percentiles(whole),
        "accept_us": percentiles(accept),
    }


def _throughput(
    engine: SlotEngine, prompts: list[list[int]], grammar: Grammar, params: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Tokens per second of all streams, free and constrained in turns; the first turn warms up."""
    rates: dict[str, list[float]] = {"free": [], "constrained": []}
    for turn in range(repeats + 1):
        for name, found in rates.items():
            rate = _run(engine, prompts, grammar if name == "constrained" else None, params)
            if turn:
                found.append(rate)
    free, constrained = (summarise(found) for found in rates.values())
    assert free is not None and constrained is not None
    return {
        "temperature": params["temperature"],
        "free_tokens_per_second": asdict(free),
        "constrained_tokens_per_second": asdict(constrained),
        "constrained_over_free": asdict(paired(rates["constrained"], rates["free"])),
    }


def _run(engine: SlotEngine, prompts: list[list[int]], grammar: Grammar | None, params: dict[str, Any]) -> float:
    streams = []
    for index, prompt in enumerate(prompts):
        chosen = SamplingParams(seed=index, ignore_eos=grammar is None, **params)
        streams.append(Stream(engine, GenerationRequest(tuple(prompt), chosen, grammar=grammar)))
    times = sorted(timestamp for stream in streams for timestamp in stream.whole().times[0])
    # While all decode: from when the last one begins, the prompts before it read.
    steady = times[len(prompts) * len(prompts) :]
    return (len(steady) - 1) / (steady[-1] - steady[0])


if __name__ == "__main__":
    run(main)
