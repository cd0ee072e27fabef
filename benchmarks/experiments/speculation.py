"""Speculative decoding compared with plain decoding: tokens per second of single streams, and whether tokens are equal.

python -m benchmarks.experiments.speculation BUNDLE --graph ort/fp32 --prompts held-out.txt --prompts code.jsonl

A prompt file has one prompt a line: a JSON object with the key "prompt" in a .jsonl file, text in any other. Without
one, prompts are cut from the bundle's own held-out text. Two engines, one with speculation and one without, run each
prompt in turns. A stream's rate counts from its first token to its last, so prefill is not in it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.common.hardware import environment
from benchmarks.common.held_out_text import cut_prompts, read_text
from benchmarks.common.standalone import run
from benchmarks.common.statistics import paired, summarise
from serving.bundle import Bundle, open_bundle
from serving.engine.api import Event, FinishEvent, GenerationRequest, TokenEvent
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine, open_engine
from serving.errors import GPT2BundleError, InputError
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import load_tokenizer

HELD_OUT = "held-out text"
_COUNTS = ("drafted_prompt_tokens", "accepted_prompt_tokens", "drafted_ngram_tokens", "accepted_ngram_tokens",
           "replayed_tokens", "steps", "generated_tokens")  # fmt: skip


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/fp32", show_default=True)
@click.option(
    "--prompts",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file with one prompt a line. May be repeated.  [default: the bundle's held-out text]",
)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=(0.0, 0.8), show_default=True)
@click.option("--most", default=32, show_default=True, help="Prompts of each file, the first ones.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Tokens of a prompt at most: its last ones.")
@click.option("--new-tokens", default=128, show_default=True, help="Tokens that each prompt is continued by.")
@click.option("--rounds", default=3, show_default=True, help="Rounds in which each prompt runs both ways.")
@click.option("--threads", type=int, help="Threads of ONNX Runtime.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path, graph: str, files: tuple[Path, ...], temperatures: tuple[float, ...], threads: int | None,
    output: Path | None, **sizes: int,
) -> None:  # fmt: skip
    """Measure on the folder BUNDLE."""
    opened = open_bundle(bundle, check="sizes")
    sets = {str(file): _read_prompts(opened, file, sizes) for file in files}
    sets = sets or {HELD_OUT: cut_prompts(read_text(opened), sizes["most"], sizes["prompt_tokens"])}
    engines = {
        name: open_engine(opened, graph, config=EngineConfig(slots=1, threads=threads, speculation=name))
        for name in ("auto", "off")
    }
    try:
        rows = [
            _compare(engines, name, prompts, temperature, sizes["new_tokens"], sizes["rounds"])
            for name, prompts in sets.items()
            for temperature in temperatures
        ]
    finally:
        for engine in engines.values():
            engine.close()
    record = {"bundle": opened.manifest.name, "environment": environment(), "graph": graph, **sizes, "rows": rows}
    click.echo(json.dumps(record, indent=2))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_prompts(bundle: Bundle, file: Path, sizes: dict[str, int]) -> list[list[int]]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][: sizes["most"]]
        texts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("no prompts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no prompts to read ({error}); write one on each line") from None
    tokenizer = load_tokenizer(bundle)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [each[-sizes["prompt_tokens"] :] for each in ids if each]


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
    before = _counts(engines["auto"])
    for turn in range(rounds):
        for seed, prompt in enumerate(prompts):
            order = list(engines) if (turn + seed) % 2 else list(engines)[::-1]
            found = {way: _stream(engines[way], prompt, temperature, seed, new_tokens) for way in order}
            for way, (_, rate) in found.items():
                rates[way].append(rate)
            equal += sum(one == other for one, other in zip(found["auto"][0], found["off"][0], strict=False))
            total += len(found["off"][0])
    counts = {key: value - before[key] for key, value in _counts(engines["auto"]).items()}
    row = {
        "prompts": name,
        "temperature": temperature,
        "streams": len(rates["auto"]),
        "tokens_per_second": {way: _table(summarise(each)) for way, each in rates.items()},
        "auto_over_off": asdict(paired(rates["auto"], rates["off"])),
        "tokens": {"equal": equal, "of": total},
        "tokens_per_step": counts["generated_tokens"] / max(1, counts["steps"]),
        **counts,
    }
    click.echo(json.dumps(row), err=True)
    return row


def _counts(engine: SlotEngine) -> dict[str, int]:
    return {name: getattr(engine.stats(), name) for name in _COUNTS}


def _table(summary: Any) -> dict[str, float] | None:
    return None if summary is None else asdict(summary)


def _stream(
    engine: SlotEngine, prompt: Sequence[int], temperature: float, seed: int, new_tokens: int
) -> tuple[list[int], float]:
    """The tokens of one stream, and their rate after the first one."""
    tokens: list[int] = []
    times: list[float] = []
    reasons: list[str] = []
    ended = threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, TokenEvent):
            tokens.append(event.token_id)
            times.append(time.perf_counter())
        elif isinstance(event, FinishEvent):
            reasons.append(event.reason)
            ended.set()

    params = SamplingParams(max_new_tokens=new_tokens, temperature=temperature, seed=seed, ignore_eos=True)
    engine.submit(GenerationRequest(tuple(prompt), params), listen)
    ended.wait()
    if reasons != ["length"] or len(tokens) < 2:
        raise GPT2BundleError(f"a stream ended with {reasons[0]} after {len(tokens)} tokens; its rate means nothing")
    return tokens, (len(times) - 1) / max(times[-1] - times[0], 1e-9)


if __name__ == "__main__":
    run(main)
