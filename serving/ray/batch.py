"""A file of requests answered by models on a Ray cluster: python -m serving.ray.batch BUNDLE REQUESTS ANSWERS.

The lines, the answers and what an interruption leaves are those of `gpt2-bundle batch`, whose code this is; Ray Data
spreads the requests over actors, each with the bundle loaded.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import ray

from serving.commands.serve import build_server
from serving.entrypoints.batch_files import AnswerFile
from serving.entrypoints.batch_runner import call, unanswered
from serving.errors import GPT2BundleError, InputError, one_line
from serving.ray.options import RayOptions, check_bundle, check_nodes

# Requests that Ray holds at once, so that a file of any length fits its memory.
_BLOCK = 20_000
_MAX_BODY = 4 << 20


class Answerer:
    """One model; Ray Data calls it with batches of requests."""

    def __init__(self, options: RayOptions) -> None:
        self._app, self._versions = build_server(Path(options.bundle), options.serve_options())
        self._versions.start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer all requests of a batch concurrently; a row each: custom_id, status, request_id, body."""
        answers = asyncio.run(self._answer(batch["url"], batch["body"]))
        return {
            "custom_id": list(batch["custom_id"]),
            "status": [status for status, _, _ in answers],
            "request_id": [request_id for _, request_id, _ in answers],
            "body": [body for _, _, body in answers],
        }

    async def _answer(self, urls: Any, bodies: Any) -> list[tuple[int, str, bytes]]:
        return await asyncio.gather(*(call(self._app, url, body) for url, body in zip(urls, bodies, strict=True)))


def answer_file(options: RayOptions, requests: Path, answers: AnswerFile, actors: int, batch_size: int) -> None:
    """Answer each line of `requests` that `answers` has no answer of, by `actors` models on the cluster."""
    waiting = unanswered(requests, answers, _MAX_BODY)
    while rows := list(itertools.islice(waiting, _BLOCK)):
        items = [{"custom_id": each.custom_id, "url": each.url, "body": each.body} for each in rows]
        blocks = max(1, min(len(items), max(2 * actors, len(items) // batch_size)))
        done = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            Answerer,
            fn_constructor_args=(options,),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=options.cpus,
            num_gpus=options.gpus or None,
        )
        for row in _rows(done):
            answers.add_answer(row["custom_id"], int(row["status"]), row["request_id"], row["body"])


def _rows(done: Any) -> Iterator[dict[str, Any]]:
    """The answered rows as they come. Raises GPT2BundleError if the cluster could not answer them."""
    try:
        yield from done.iter_rows()
    except ray.exceptions.RayError as error:
        raise GPT2BundleError(
            f"the Ray cluster could not answer all requests: {one_line(error)}; run the same command again"
        ) from None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("requests", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("answers", type=click.Path(path_type=Path))
@click.option("--actors", default=1, show_default=True, type=click.IntRange(1, 10_000), help="Number of models.")
@click.option("--cpus", default=1.0, show_default=True, type=click.FloatRange(0), help="Processors of each model.")
@click.option("--gpus", default=0.0, show_default=True, type=click.FloatRange(0), help="GPUs of each model.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Requests of one call.")
@click.option("--address", help="Use the Ray cluster at this address.  [default: RAY_ADDRESS, or this machine]")
@click.option("--serve", "serve_options", multiple=True, metavar="OPTION", help="Option of gpt2-bundle serve.")
def main(
    bundle: Path,
    requests: Path,
    answers: Path,
    actors: int,
    cpus: float,
    gpus: float,
    batch_size: int,
    address: str | None,
    serve_options: tuple[str, ...],
) -> int:
    """Answer each line of REQUESTS with BUNDLE, and append the answers to ANSWERS; both have OpenAI's batch lines."""
    if answers.exists() and answers.samefile(requests):
        raise InputError(f"{answers}: requests and answers are one file; name another for the answers")
    fixed = ("--request-timeout=0", f"--queue={batch_size}", "--no-access-log")
    options = RayOptions(str(bundle.resolve()), (*fixed, *serve_options), cpus=cpus, gpus=gpus)
    check_bundle(options)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = address or "this machine or RAY_ADDRESS"
        raise GPT2BundleError(f"no Ray cluster answers at {where}: {one_line(error)}") from None
    check_nodes(options.need(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
    ray.data.DataContext.get_current().enable_progress_bars = False
    with AnswerFile(answers) as written:
        before = written.answered
        answer_file(options, requests, written, actors, batch_size)
        line = {"answers": written.answered, "new": written.answered - before, "errors": written.failed}
        click.echo(json.dumps(line))
        return 1 if written.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(standalone_mode=False))
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except GPT2BundleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
