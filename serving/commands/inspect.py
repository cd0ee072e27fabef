"""`gpt2-bundle inspect`: check a bundle against its manifest and print what is in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import BundlePath
from serving.support.json_line import json_line

if TYPE_CHECKING:
    from serving.bundle import Bundle


@click.command()
@click.argument("bundle", type=BundlePath())
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.  [default: tables]")
@click.option(
    "--no-hashes", is_flag=True, help="Compare the sizes of files, not their hashes.  [default: compare both]"
)
def inspect(bundle: Path, as_json: bool, no_hashes: bool) -> None:
    """Check every file of the folder BUNDLE and print what its manifest says."""
    from serving.bundle import open_bundle

    opened = open_bundle(bundle, check="sizes" if no_hashes else "hashes")
    if as_json:
        click.echo(json_line(summary(opened, checked="sizes" if no_hashes else "hashes")))
    else:
        _print(opened, checked="sizes" if no_hashes else "hashes")


def summary(bundle: Bundle, checked: str) -> dict[str, Any]:
    """What `inspect --json` prints: the manifest, and what is computed from it."""
    manifest = bundle.manifest
    return {
        "folder": str(bundle.folder),
        "checked": checked,
        "files": len(manifest.artifacts),
        "total_size": manifest.total_size,
        "parameters": manifest.model.parameters,
        "graph_sizes": {name: bundle.graph_size(name) for name in manifest.graphs},
        "manifest": dataclasses.asdict(manifest),
    }


def _print(bundle: Bundle, checked: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # Into a file or pipe, a hash stays on one line.
    manifest, model = bundle.manifest, bundle.manifest.model

    def table(title: str, rows: Iterator[tuple[str, str]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(printable(name)), Text(printable(value)))
        if grid.row_count:
            console.print(grid)
            console.print()

    how = "every SHA-256 matches" if checked == "hashes" else "every size matches, contents not read"
    shape = f"{model.n_layer} layers of {model.n_embd}, {model.n_head} heads of {model.head_dim}, MLP {model.n_inner}"
    about = {
        "folder": str(bundle.folder),
        "created": manifest.created,
        "files": f"{len(manifest.artifacts)}, {byte_text(manifest.total_size)}; {how}",
        "model": f"GPT-2, {model.parameters:,} parameters: {shape}",
        "context": f"{model.n_positions} tokens of a vocabulary of {model.vocab_size}",
        "tokenizer": manifest.tokenizer.id,
    }
    table(manifest.name, iter(about.items()))

    graphs = Table(title="graphs", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    graphs.add_column("name", overflow="fold")
    for heading in ("runtime", "precision", "padding", "cache"):
        graphs.add_column(heading)
    graphs.add_column("size", justify="right")
    for name, graph in manifest.graphs.items():
        size = byte_text(bundle.graph_size(name))
        graphs.add_row(printable(name), graph.runtime, graph.precision, graph.padding, graph.cache, size)
    console.print(graphs)

    table("quality", ((name, f"{value:.6g}") for name, value in manifest.quality.items()))
    table("parity", flat(manifest.parity))
    provenance = manifest.provenance
    table("provenance", iter({"corpus sha256": provenance.corpus_sha256, "seed": str(provenance.seed)}.items()))
    table("versions", iter(provenance.versions.items()))
    table("recipe", flat(provenance.recipe))


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested tables as (dotted key, value as text)."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield prefix + key, f"{value:.6g}"
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor, newlines too, written as an escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def byte_text(size: int) -> str:
    """A size in bytes for people, in powers of 1000 as disks and hubs count: 497.8 MB."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
