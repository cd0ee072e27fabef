"""`gpt2-bundle generate`: continue one prompt, on the terminal as it comes or as one line of JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import Seed
from serving.errors import InputError, printable
from serving.sampling import SamplingParams
from serving.support.json_line import json_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from serving.bundle import Bundle

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--runtime", default="onnx", show_default=True, metavar="NAME", help="onnx or tensorflow.")
@click.option("--graph", metavar="NAME", help="A graph by its name in the manifest, such as ort/int8.")
@click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N, for ONNX Runtime."
)
@click.option("--max-new-tokens", default=_DEFAULTS["max_new_tokens"], show_default=True, help="Tokens to add at most.")
@click.option(
    "--temperature", default=_DEFAULTS["temperature"], show_default=True, help="0 takes the likeliest token each time."
)
@click.option("--top-k", default=_DEFAULTS["top_k"], show_default=True, help="Sample among the k likeliest; 0 is all.")
@click.option("--top-p", default=_DEFAULTS["top_p"], show_default=True, help="Sample among the likeliest of this mass.")
@click.option(
    "--min-p",
    default=_DEFAULTS["min_p"],
    show_default=True,
    help="Leave out what is less likely than this share of the likeliest.",
)
@click.option(
    "--repetition-penalty",
    default=_DEFAULTS["repetition_penalty"],
    show_default=True,
    help="Above 1, tokens that came, prompt too, come less.",
)
@click.option(
    "--presence-penalty",
    default=_DEFAULTS["presence_penalty"],
    show_default=True,
    help="Taken from the logit of each token generated.",
)
@click.option(
    "--frequency-penalty",
    default=_DEFAULTS["frequency_penalty"],
    show_default=True,
    help="The same, for each time that it came.",
)
@click.option(
    "--logit-bias", multiple=True, metavar="ID=VALUE", help="Add to a token's logit; may be given several times."
)
@click.option(
    "--seed", type=Seed(), default=_DEFAULTS["seed"], show_default=True, help="Equal seeds give equal text; -1 is none."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=int,
    multiple=True,
    metavar="ID",
    help="End at this token; may be given several times.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option(
    "--chat", is_flag=True, help="Take PROMPT as a user's message and answer it, by the bundle's chat template."
)
@click.option("--system", metavar="TEXT", help="With --chat, a system message before it.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON at the end instead of text as it comes.")
def generate(
    bundle: Path,
    prompt: str,
    runtime: str,
    graph: str | None,
    device: str,
    as_json: bool,
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    logit_bias: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in the folder BUNDLE and print the continuation.

    PROMPT '-' reads standard input, less one newline at its end; an empty one starts from the end-of-text token. Put
    '--' before a PROMPT that begins with a dash.
    """
    params = SamplingParams(stop=stop, logit_bias=tuple(map(_read_bias, logit_bias)), **sampling)
    if system is not None and not chat:
        raise InputError("--system is a message of a chat; give --chat too")
    text = _read_prompt(prompt)

    # Only now, so that a mistyped option is answered at once.
    from serving.backends.loader import load_backend
    from serving.bundle import open_bundle
    from serving.generation import stream
    from serving.sampling.detokenizer import TextStream, load_tokenizer

    opened = open_bundle(bundle, check="sizes")
    tokenizer = load_tokenizer(opened)
    eos_token_id = opened.manifest.model.eos_token_id
    if chat:
        text, ends = _rendered(opened, tokenizer, text, system)
        if not params.ignore_eos:
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
    prompt_ids = tokenizer.encode(text, add_special_tokens=False).ids or [eos_token_id]
    pieces = TextStream(tokenizer, params.stop)
    backend = load_backend(opened, runtime, graph, device)

    began = time.perf_counter()
    token_ids: list[int] = []
    parts: list[str] = []

    def put(piece: str) -> None:
        parts.append(piece)
        if piece and not as_json:
            write(piece)

    for token in stream(backend, prompt_ids, params, eos_token_id):
        token_ids.append(token)
        put(pieces.push(token))
        if pieces.stopped:
            break
    put(pieces.finish())
    seconds = time.perf_counter() - began
    if not as_json:
        write("\n")
        return
    ended = pieces.stopped or token_ids[-1] in params.end_ids(eos_token_id)
    report = {
        "text": "".join(parts),
        "token_ids": token_ids,
        "finish_reason": "stop" if ended else "length",
        "runtime": runtime,
        "prompt_tokens": len(prompt_ids),
        "seconds": round(seconds, 6),
        "tokens_per_second": round(len(token_ids) / seconds, 3) if seconds > 0 else None,
    }
    click.echo(json_line(report))


def _rendered(bundle: Bundle, tokenizer: Tokenizer, text: str, system: str | None) -> tuple[str, tuple[int, ...]]:
    """The prompt of a chat of one message, and the tokens that end the answer."""
    from serving.chat import chat_template

    template = chat_template(bundle)
    if template is None:
        raise InputError(f"{bundle.folder}: the bundle has no chat template; leave --chat out")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    with contextlib.closing(template):
        return template.render(messages), template.end_token_ids(tokenizer)


def _read_bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise InputError(f"--logit-bias is {text!r}; write ID=VALUE, such as 50256=-100") from None


def _read_prompt(prompt: str) -> str:
    try:
        if prompt == "-":
            if sys.stdin is None:
                raise InputError("there is no standard input to read the prompt from; give the prompt itself")
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        prompt.encode("utf-8")
    except UnicodeError:
        raise InputError("the prompt is not valid UTF-8 text; convert it to UTF-8 first") from None
    return prompt


def write(text: str) -> None:
    """Print `text` now, with '?' for what the terminal's encoding has no form for, and no orders to a terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    if sys.stdout.isatty():
        text = printable(text)
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()
