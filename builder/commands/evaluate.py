"""`gpt2-bundle evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", required=True, metavar="PATH", help="File, folder or glob to score.")
@click.option("--text-field", metavar="NAME",
              help="Field or column that is the text, in .jsonl, .csv and .parquet.  [default: text, or responses for "
              "a bundle that was trained on instructions]")  # fmt: skip
@click.option("--window", type=int, metavar="N", help="Tokens read at once; the model's context by default.")
@click.option("--stride", type=int, metavar="N", help="Tokens between two windows; half a window by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def evaluate(
    bundle: Path, text: str, text_field: str | None, window: int | None, stride: int | None, as_json: bool
) -> None:
    """Perplexity of a text by a sliding window, through the Keras weights of BUNDLE.

    Each token but the first is scored once, with all the context that the first window to reach it holds. A smaller
    stride gives more context and costs more passes. Of a bundle that was trained on instructions, PATH has records
    with the same fields, and the responses alone are scored; --text-field reads plain text instead.
    """
    from builder.verification.perplexity import evaluate_bundle, instruction_of
    from serving.bundle import open_bundle

    opened = open_bundle(bundle)
    record = evaluate_bundle(
        opened.folder,
        text,
        window=window,
        stride=stride,
        text_field=text_field or "text",
        instruction=instruction_of(opened) if text_field is None else None,
    )
    if as_json:
        click.echo(json.dumps(record))
    else:
        click.echo(
            f"perplexity {record['perplexity']:.3f} ({record['loss']:.4f} nats a token) over {record['tokens']:,} "
            f"tokens, window {record['window']}, stride {record['stride']}"
        )
