"""`gpt2-bundle client`: talk to a running TensorFlow Serving, or to `gpt2-bundle serve`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import Seconds
from serving.commands.sampling_options import sampling_options
from serving.errors import InputError
from serving.sampling import SamplingParams
from serving.support.json_line import json_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from serving.clients.completions import Completions
    from serving.clients.tf_serving import TFServingClient
    from serving.clients.transport import Piece


@click.group()
def client() -> None:
    """Call a TensorFlow Serving that serves a bundle, or 'gpt2-bundle serve', over REST (--url) or gRPC (--grpc).

    A call is retried while the server is busy or unreachable, within --timeout.
    """


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--url", metavar="URL", help="Call the server over REST at this URL, such as http://127.0.0.1:8501."),
        click.option("--grpc", "grpc_address", metavar="HOST:PORT",
                     help="Call the server over gRPC at this address, such as 127.0.0.1:8500."),
        click.option("--api-key", envvar="GPT2_BUNDLE_API_KEY", metavar="KEY", show_envvar=True,
                     help="Send this API key. Other users of the machine can read a command line, "
                          "but not the variable.  [default: no key]"),
        click.option("--model", required=True, metavar="NAME", help="Call the model of this name on the server."),
        click.option("--timeout", type=Seconds(zero=False), default=60.0, show_default=True,
                     metavar="SECONDS", help="Maximum time of a call with all its retries."),
        click.option("--retries", type=click.IntRange(0, 100), default=4, show_default=True,
                     help="Maximum number of retries after the first try."),
        click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.  [default: text]"),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _open(
    url: str | None,
    grpc_address: str | None,
    api_key: str | None,
    model: str,
    timeout: float,
    retries: int,
    eos_token_id: int | None = None,
) -> TFServingClient:
    from serving.clients.tf_serving import TFServingClient
    from serving.clients.transport import Transport

    if (url is None) == (grpc_address is None):
        raise InputError("name one server: --url http://127.0.0.1:8501 or --grpc 127.0.0.1:8500")
    transport: Transport
    if url is not None:
        from serving.clients.rest_transport import RestTransport

        transport = RestTransport(url, model, api_key=api_key)
    else:
        from serving.clients.grpc_transport import GrpcTransport

        transport = GrpcTransport(grpc_address or "", model, api_key)
    return TFServingClient(transport, timeout=timeout, retries=retries, eos_token_id=eos_token_id)


@client.command()
@_server_options
def status(as_json: bool, **server: Any) -> None:
    """Print the state of the model's versions."""
    versions = _open(**server).status()
    if as_json:
        click.echo(json_line({"versions": versions}))
        return
    for each in versions:
        said = f" {each['error_code']}: {each['error_message']}" if each["error_message"] else ""
        click.echo(f"version {each['version']}: {each['state']}{said}")


@client.command()
@_server_options
def metadata(as_json: bool, **server: Any) -> None:
    """Print the model's signatures."""
    signatures = _open(**server).metadata()
    if as_json:
        click.echo(json_line({"signatures": signatures}))
        return
    for name, sides in signatures.items():
        click.echo(name)
        for side, tensors in sides.items():
            for key, spec in tensors.items():
                click.echo(f"  {side[:-1]:<6} {key}: {spec['dtype']} {spec['shape']}")


@client.command()
@click.argument("inputs")
@click.option("--signature", default="serving_default", show_default=True, metavar="NAME",
              help="Call this signature of the model.")  # fmt: skip
@click.option(
    "--once",
    is_flag=True,
    help="Do not retry; use it for a signature that changes the state of the server.  [default: retry]",
)
@_server_options
def predict(inputs: str, signature: str, once: bool, as_json: bool, **server: Any) -> None:
    """Run a signature on INPUTS, a JSON object of lists by name, or @FILE with one, and print the outputs as JSON."""
    try:
        columns = json.loads(Path(inputs[1:]).read_text("utf-8") if inputs.startswith("@") else inputs)
    except ValueError as error:
        raise InputError(f"the inputs are not JSON ({error})") from None
    if not isinstance(columns, dict):
        raise InputError('the inputs must be an object of lists by name, such as {"text": ["Return the"]}')
    outputs = _open(**server).predict(columns, signature, idempotent=not once)
    plain = {name: _plain(value.tolist()) for name, value in outputs.items()}
    click.echo(json_line({"outputs": plain} if as_json else plain))


@client.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@sampling_options(slots_only=True)
@click.option("--stream/--no-stream", "streamed", default=None,
              help="Print the text as it is generated, if the server has slots or is 'gpt2-bundle serve'.  "
                   "[default: on a terminal]")  # fmt: skip
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="BUNDLE",
              help="Encode and decode here, with the tokenizer of this bundle.  [default: on the server]")  # fmt: skip
@_server_options
def generate(
    prompts: tuple[str, ...],
    streamed: bool | None,
    tokenizer: Path | None,
    as_json: bool,
    url: str | None,
    grpc_address: str | None,
    api_key: str | None,
    model: str,
    timeout: float,
    retries: int,
    **sampling: Any,
) -> None:
    """Continue each PROMPT and print the continuations, in order, each ending in a new line.

    A PROMPT '-' stands for the lines of standard input, a prompt each. With --json each continuation is a line of its
    own.
    """
    params = SamplingParams(**sampling)
    texts = [text for prompt in prompts for text in (_lines() if prompt == "-" else [prompt])]
    if not texts:
        raise InputError("standard input has no line; give at least one prompt")
    loaded, end = None, None
    if tokenizer is not None:
        from serving.bundle import open_bundle
        from serving.sampling.detokenizer import load_tokenizer

        bundle = open_bundle(tokenizer, check="sizes")
        loaded, end = load_tokenizer(bundle), bundle.manifest.model.eos_token_id
    server = _open(url, grpc_address, api_key, model, timeout, retries, end)
    special = streamed or params.stop or params.stop_token_ids or params.ignore_eos
    perhaps = streamed is None and not as_json and sys.stdout.isatty()
    slots, completions = False, None
    if special or perhaps:
        slots = server.has_slots()
        completions = None if slots else _completions(server, url, model, api_key)
    there = slots or completions is not None
    plain = grpc_address is not None and not (as_json or params.ignore_eos)
    if plain and not there and (special or perhaps) and _wrote_by_stream(server, texts, params, loaded, streamed):
        return
    if special and not there:
        given_first = {"--stream": streamed, "--stop": params.stop, "--stop-token-id": params.stop_token_ids}
        wanted = next((option for option, given in given_first.items() if given), "--ignore-eos")
        raise InputError(
            f"{wanted} needs a served model with slots, and {model!r} has none; leave it out, "
            "or, if 'gpt2-bundle serve' answers there, name it by --url"
        )
    streamed = there and perhaps if streamed is None else streamed
    given = texts if completions is None or loaded is None else _token_ids(texts, loaded)
    from serving.commands.generate import write

    if streamed and not as_json:
        pieces = server.stream(texts, params, loaded) if completions is None else completions.stream(given, params)
        for text in _in_order(pieces, len(texts)):
            write(text)
        return
    if completions is None:
        made = server.generate(texts, params, loaded, slots=streamed or None)
    else:
        made = completions.generate(given, params)
    for each in made:
        if as_json:
            click.echo(json_line(dataclasses.asdict(each)))
        else:
            write(each.text + "\n")


def _wrote_by_stream(
    server: TFServingClient,
    texts: list[str],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    streamed: bool | None,
) -> bool:
    """Print the continuations by PredictStreamed; False, with nothing printed, where the server does not have it."""
    from serving.commands.generate import write
    from serving.errors import ServerError

    pieces = _in_order(server.predict_stream(texts, params, tokenizer), len(texts))
    try:
        first = next(pieces)
    except ServerError as error:
        if error.code != "UNIMPLEMENTED":
            raise
        return False
    if streamed is not False:
        write(first)
        for text in pieces:
            write(text)
    else:
        write(first + "".join(pieces))
    return True


def _completions(server: TFServingClient, url: str | None, model: str, api_key: str | None) -> Completions | None:
    """The completions of `gpt2-bundle serve`, if it is what answers at `url`."""
    if url is None:
        return None
    from serving.clients.completions import Completions

    completions = Completions(server, url, model, api_key)
    return completions if completions.offered() else None


def _token_ids(texts: list[str], tokenizer: Tokenizer) -> list[str | list[int]]:
    """Texts by the tokenizer here; an empty one, which has no tokens, is left to the server."""
    return [tokenizer.encode(text, add_special_tokens=False).ids or text for text in texts]


def _lines() -> list[str]:
    if sys.stdin is None:
        raise InputError("there is no standard input to read prompts from; give the prompts themselves")
    try:
        return sys.stdin.buffer.read().decode("utf-8").splitlines()
    except UnicodeError:
        raise InputError("standard input is not valid UTF-8 text; convert it to UTF-8 first") from None


def _in_order(pieces: Iterator[Piece], count: int) -> Iterator[str]:
    """The text of `count` prompts, one behind the other: the first that is not finished as it comes."""
    held: list[list[str]] = [[] for _ in range(count)]
    finished = [False] * count
    shown = 0
    for piece in pieces:
        held[piece.index].append(piece.text)
        finished[piece.index] = piece.finish_reason is not None
        while shown < count:
            yield "".join(held[shown])
            held[shown].clear()
            if not finished[shown]:
                break
            yield "\n"
            shown += 1


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
