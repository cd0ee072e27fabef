"""`gpt2-bundle evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from serving.commands.param_types import BundlePath, GraphName
from serving.support.json_line import json_line


@click.command()
@click.argument("bundle", type=BundlePath())
@click.option("--text", required=True, metavar="PATH", help="File, folder or glob to score.")
@click.option("--text-field", metavar="NAME",
              help="Field or column that is the text, in .jsonl, .csv and .parquet.  [default: text, or responses for "
              "a bundle that was trained on instructions]")  # fmt: skip
@click.option("--transform", metavar="FILE.py:FUNCTION",
              help="Function to apply to each text first, as corpus.transform of a recipe, or none. Required for a "
              "bundle whose recipe has one.")  # fmt: skip
@click.option("--window", type=int, metavar="N", help="Tokens read at once; the model's context by default.")
@click.option("--stride", type=int, metavar="N", help="Tokens between two windows; half a window by default.")
@click.option("--graph", type=GraphName(), metavar="NAME",
              help="Graph to measure as it is served, such as ort/int8 or savedmodel, and how far it is from the "
              "Keras weights.  [default: the Keras weights]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def evaluate(
    bundle: Path,
    text: str,
    text_field: str | None,
    transform: str | None,
    window: int | None,
    stride: int | None,
    graph: str | None,
    as_json: bool,
) -> None:
    """Perplexity of a text by a sliding window, through the Keras weights of BUNDLE or one of its graphs.

    Each token but the first is scored once, with all the context that the first window to reach it holds. A smaller
    stride gives more context and costs more passes. Of a bundle that was trained on instructions, PATH has records
    with the same fields, and the responses alone are scored; --text-field reads plain text instead.
    """
    from builder.verification.paired_loss import relative_difference
    from builder.verification.perplexity import chosen_transform, evaluate_bundle, instruction_of, open_graph
    from serving.bundle import open_bundle

    opened = open_bundle(bundle)
    record = evaluate_bundle(
        opened.folder,
        text,
        window=window,
        stride=stride,
        text_field=text_field or "text",
        instruction=instruction_of(opened) if text_field is None else None,
        transform=chosen_transform(opened, transform),
        backend=None if graph is None else open_graph(opened, graph),
    )
    if as_json:
        click.echo(json_line(record))
    else:
        click.echo(
            f"perplexity {record['perplexity']:.3f} ({record['loss']:.4f} nats a token) over {record['tokens']:,} "
            f"tokens, window {record['window']}, stride {record['stride']}"
        )
        if graph is not None:
            click.echo(
                f"{graph}: {relative_difference(record)} from the Keras weights in float32, whose perplexity is "
                f"{record['reference_perplexity']:.3f}"
            )
