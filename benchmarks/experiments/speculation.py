"""Speculative decoding compared with plain decoding: tokens per second of single streams, and whether tokens are equal.

python -m benchmarks.experiments.speculation BUNDLE --graph ort/fp32 --prompts held-out.txt --prompts code.jsonl

A prompt file has one prompt a line: a JSON object with the key "prompt" in a .jsonl file, text in any other. Without
one, prompts are cut from the bundle's own held-out text. Two engines, one with speculation and one without, run each
prompt in turns. A stream's rate counts from its first token to its last, so prefill is not in it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.common.engine_stream import Stream
from benchmarks.common.held_out_text import cut_prompts, read_text
from benchmarks.common.standalone import measurement, run, say
from benchmarks.common.statistics import paired, summarise
from serving.backends.verify_steps import SpeculationMode
from serving.bundle import Bundle
from serving.engine.api import GenerationRequest
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine, open_engine
from serving.errors import InputError
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import load_tokenizer

HELD_OUT = "held-out text"
_COUNTS = ("drafted_prompt_tokens", "accepted_prompt_tokens", "drafted_ngram_tokens", "accepted_ngram_tokens",
           "replayed_tokens", "steps", "generated_tokens")  # fmt: skip


@measurement(
    click.option("--prompts", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
                 help="A file with one prompt a line. May be repeated.  [default: the bundle's held-out text]"),
    click.option("--temperature", "temperatures", multiple=True, type=float, default=(0.0, 0.8), show_default=True),
    click.option("--rounds", default=3, show_default=True, help="Rounds in which each prompt runs both ways."),
    click.option("--threads", type=int, help="Threads of ONNX Runtime."),
    graph="ort/fp32", table=partial(json.dumps, indent=1), most=32, prompt_tokens=128, new_tokens=128,
)  # fmt: skip
def main(
    bundle: Bundle, graph: str, files: tuple[Path, ...], temperatures: tuple[float, ...], rounds: int,
    threads: int | None, most: int, prompt_tokens: int, new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure on the folder BUNDLE; a prompt is its last --prompt-tokens at most."""
    sets = {str(file): _read_prompts(bundle, file, most, prompt_tokens) for file in files}
    sets = sets or {HELD_OUT: cut_prompts(read_text(bundle), most, prompt_tokens)}
    with contextlib.ExitStack() as stack:
        engines: dict[str, SlotEngine] = {}
        modes: tuple[SpeculationMode, ...] = ("on", "off")
        for name in modes:
            config = EngineConfig(slots=1, threads=threads, speculation=name)
            engines[name] = stack.enter_context(contextlib.closing(open_engine(bundle, graph, config=config)))
        rows = [
            _compare(engines, name, prompts, temperature, new_tokens, rounds)
            for name, prompts in sets.items()
            for temperature in temperatures
        ]
    return {"files": list(map(str, files)), "rows": rows}


def _read_prompts(bundle: Bundle, file: Path, most: int, prompt_tokens: int) -> list[list[int]]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:most]
        texts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("no prompts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no prompts to read ({error}); write one on each line") from None
    tokenizer = load_tokenizer(bundle)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [each[-prompt_tokens:] for each in ids if each]


def _compare(
    engines: dict[str, SlotEngine],
    name: str,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """One prompt set at one temperature; the first prompt warms both engines up."""
    rates: dict[str, list[float]] = {way: [] for way in engines}
    equal, total = 0, 0
    for engine in engines.values():
        _stream(engine, prompts[0], temperature, 0, new_tokens)
    before = _counts(engines["on"])
    for turn in range(rounds):
        for seed, prompt in enumerate(prompts):
            order = list(engines) if (turn + seed) % 2 else list(engines)[::-1]
            found = {way: _stream(engines[way], prompt, temperature, seed, new_tokens) for way in order}
            for way, (_, rate) in found.items():
                rates[way].append(rate)
            equal += sum(one == other for one, other in zip(found["on"][0], found["off"][0], strict=False))
            total += len(found["off"][0])
    counts = {key: value - before[key] for key, value in _counts(engines["on"]).items()}
    row = {
        "prompts": name,
        "temperature": temperature,
        "streams": len(rates["on"]),
        "tokens_per_second": {way: asdict(summary) for way, each in rates.items() if (summary := summarise(each))},
        "on_over_off": asdict(paired(rates["on"], rates["off"])),
        "tokens": {"equal": equal, "of": total},
        "tokens_per_step": counts["generated_tokens"] / max(1, counts["steps"]),
        **counts,
    }
    say(row)
    return row


def _counts(engine: SlotEngine) -> dict[str, int]:
    return {name: getattr(engine.stats(), name) for name in _COUNTS}


def _stream(
    engine: SlotEngine, prompt: Sequence[int], temperature: float, seed: int, new_tokens: int
) -> tuple[list[int], float]:
    """The tokens of one stream, and their rate after the first one."""
    params = SamplingParams(max_new_tokens=new_tokens, temperature=temperature, seed=seed, ignore_eos=True)
    stream = Stream(engine, GenerationRequest(tuple(prompt), params)).whole()
    (times,), (tokens,) = stream.times, stream.tokens
    return tokens, (len(times) - 1) / max(times[-1] - times[0], 1e-9)


if __name__ == "__main__":
    run(main)
