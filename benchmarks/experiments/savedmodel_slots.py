"""A token by `decode_slots` compared with a token by `serving_default`.

python -m benchmarks.experiments.savedmodel_slots BUNDLE/savedmodel/1

Both run in this process through TensorFlow's Session API, on random prompts, greedily, rounds taking turns. A token of
`serving_default` is the difference between calls for many tokens and for one, so its prompt is not in it; one of
`decode_slots` is a whole call, with its way in and out. `last` is one active slot, the highest: where slots below it
are free they are computed all the same.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common.hardware import environment

TOKENS = 32


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--active", default="1,4,16", show_default=True, help="Numbers of active slots.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; the first of each is not counted.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(folder: Path, active: str, prompt: int, rounds: int, output: Path | None) -> None:
    """Time slots beside the generation loop."""
    call = load(folder)
    record: dict[str, Any] = {"environment": environment(), "prompt": prompt, "rounds": rounds, "milliseconds": {}}
    for count in [int(number) for number in active.split(",")]:
        targets: dict[str, Callable[[], list[float]]] = {
            "serving_default": partial(_loop, call, count, prompt),
            "decode_slots, 1 token a call": partial(_slots, call, count, prompt, 1),
            "decode_slots, 8 tokens a call": partial(_slots, call, count, prompt, 8),
        }
        if count > 1:
            targets["decode_slots, 1 token a call, last"] = partial(_slots, call, count, prompt, 1, last=True)
        times: dict[str, list[float]] = {name: [] for name in targets}
        for number in range(rounds + 1):
            for name, target in targets.items():
                found = target()
                times[name] += found if number else []
        record["milliseconds"][str(count)] = {name: statistics.median(some) * 1e3 for name, some in times.items()}
    text = json.dumps(record, indent=2)
    click.echo(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


def load(folder: Path, intra: int = 0, inter: int = 0) -> Callable[..., dict[str, Any]]:
    """A function from a signature and its inputs to its outputs, through the Session API.

    `intra` is how many threads an op has and `inter` how many ops run at once; 0 leaves it to TensorFlow. The first
    session of a process decides.
    """
    import tensorflow as tf

    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=intra, inter_op_parallelism_threads=inter)
    session = tf.compat.v1.Session(graph=tf.Graph(), config=config)
    with session.graph.as_default():
        definitions = tf.compat.v1.saved_model.load(session, ["serve"], str(folder)).signature_def

    def call(signature: str, **inputs: Any) -> dict[str, Any]:
        definition = definitions[signature]
        feeds = {definition.inputs[name].name: value for name, value in inputs.items()}
        result: dict[str, Any] = session.run({name: info.name for name, info in definition.outputs.items()}, feeds)
        return result

    return call


def prompts(rows: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Inputs of `serving_default`: random prompts of one length, continued greedily."""
    random = np.random.default_rng(0)
    return {
        "token_ids": random.integers(0, 250, (rows, prompt)).astype(np.int32),
        "lengths": np.full(rows, prompt, np.int32),
        "max_new_tokens": np.full(rows, tokens, np.int32),
        "temperature": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "seed": np.zeros(rows, np.int64),
    }


def _loop(call: Callable[..., dict[str, Any]], rows: int, prompt: int) -> list[float]:
    """Seconds a token of `serving_default`."""
    seconds = []
    for tokens in (1, TOKENS + 1):
        began = time.perf_counter()
        call("serving_default", **prompts(rows, prompt, tokens))
        seconds.append(time.perf_counter() - began)
    return [(seconds[1] - seconds[0]) / TOKENS]


def _slots(
    call: Callable[..., dict[str, Any]], rows: int, prompt: int, steps: int, *, last: bool = False
) -> list[float]:
    """Seconds a token of each call of `decode_slots`."""
    names = np.arange(1, rows + 1, dtype=np.int64)
    given = call("prefill_slots", request_id=names, **prompts(rows, prompt, TOKENS + 1))
    if (given["status"] < 0).any():
        raise click.ClickException("the SavedModel has fewer slots than --active asks for; export it with more")
    held = {name: given[name] for name in ("slot", "generation")}
    if last:
        call("release_slots", **{name: value[:-1] for name, value in held.items()})
        held = {name: value[-1:] for name, value in held.items()}
    size, seconds = len(held["slot"]), []
    for received in range(1, TOKENS + 1, steps):
        began = time.perf_counter()
        counts = {"received": np.full(size, received, np.int32), "steps": np.full(size, steps, np.int32)}
        call("decode_slots", **held, **counts)
        seconds.append((time.perf_counter() - began) / steps)
    call("release_slots", **held)
    return seconds


if __name__ == "__main__":
    main()
