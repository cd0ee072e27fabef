"""`gpt2-bundle generate`: continue one prompt, as text while it is generated or as one line of JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from serving.commands.param_types import BundlePath, GraphName
from serving.commands.sampling_options import sampling_options
from serving.errors import InputError, cut, printable
from serving.sampling import SamplingParams
from serving.sampling.constraints import MAX_TEXT, StructuredOutput
from serving.support.json_line import json_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from serving.bundle import Bundle


@click.command()
@click.argument("bundle", type=BundlePath())
@click.argument("prompt")
@click.option(
    "--runtime", default="onnx", show_default=True, metavar="NAME", help="Run the model in onnx or tensorflow."
)
@click.option(
    "--graph",
    type=GraphName(),
    metavar="NAME",
    help="Run this ONNX graph, by its name in the manifest, such as ort/int8. auto measures once which number of "
    "threads is the fastest here, and auto:int8 also which precision down to int8.  [default: ort/fp32]",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="Run ONNX Runtime on cpu, cuda or cuda:N."
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Number of ONNX Runtime threads.  [default: the physical cores]"
)
@click.option(
    "--speculation",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "on", "off"]),
    help="Verify several drafted tokens in one step, with the same tokens: where the certificate proves it for "
    "ort/fp32 (auto), also in quantized graphs, which take a second copy of their weights (on), or never (off).",
)
@click.option(
    "--prefill-graph",
    type=GraphName(),
    default="auto",
    metavar="NAME",
    help="Prefill the prompt with this ONNX graph: auto is the one that the certificate names for --graph (ort/int8 "
    "for ort/int4), which takes memory of its own, and same is --graph itself.  [default: auto]",
)
@sampling_options()
@click.option(
    "--json", "as_json", is_flag=True, help="Print one line of JSON at the end, instead of the text as it is generated."
)
@click.option(
    "--json-schema",
    metavar="FILE|TEXT",
    help="Make the output JSON that follows this schema, a file or the schema itself.  [default: any text]",
)
@click.option("--regex", metavar="PATTERN", help="Make the whole output match this regular expression.")
@click.option(
    "--choice", "choices", multiple=True, metavar="TEXT", help="Make the output one of these texts. May be repeated."
)
@click.option(
    "--chat", is_flag=True, help="Send PROMPT as a user's message, through the bundle's chat template.  [default: off]"
)
@click.option("--system", metavar="TEXT", help="With --chat, send this system message first.  [default: none]")
def generate(
    bundle: Path,
    prompt: str,
    runtime: str,
    graph: str | None,
    device: str,
    threads: int | None,
    speculation: Literal["auto", "on", "off"],
    prefill_graph: str,
    as_json: bool,
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    logit_bias: tuple[str, ...],
    json_schema: str | None,
    regex: str | None,
    choices: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in the folder BUNDLE and print the continuation.

    PROMPT '-' reads standard input without the newline at its end. An empty PROMPT starts from the end-of-text token.
    Put '--' before a PROMPT that begins with a dash.
    """
    params = SamplingParams(stop=stop, logit_bias=tuple(map(_read_bias, logit_bias)), **sampling)
    wanted = _wanted(json_schema, regex, choices)
    if system is not None and not chat:
        raise InputError("--system is a message of a chat; give --chat too")
    text = _read_prompt(prompt)

    # Only now, so that a mistyped option is answered at once.
    from serving.backends.autotune import autotuner
    from serving.bundle import open_bundle
    from serving.model import load

    tuner = autotuner(
        graph,
        runtime=runtime,
        devices=[device],
        threads=threads,
        prefill_graph=prefill_graph,
        say=partial(click.echo, err=True),
    )
    if tuner is not None:
        setting = tuner.choose(open_bundle(bundle, check="sizes"))
        graph, threads = setting.graph, setting.threads
    model = load(
        bundle,
        graph=graph,
        runtime=runtime,
        device=device,
        threads=threads,
        speculation=speculation,
        prefill_graph=prefill_graph,
    )
    grammar = None
    if wanted is not None:
        option, structure = wanted
        try:
            grammar = model.compile(structure)
        except InputError as error:
            raise InputError(f"{option}: {error}") from None
    if chat:
        text, ends = _rendered(model.bundle, model.tokenizer, text, system)
        if not params.ignore_eos:
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
    stream = model.stream(text, params, grammar=grammar)
    began = time.perf_counter()
    for part in stream:
        if not as_json:
            write(part)
    seconds = time.perf_counter() - began
    if not as_json:
        write("\n")
        return
    completion = stream.completion
    count = len(completion.token_ids)
    report = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "runtime": runtime,
        "prompt_tokens": completion.prompt_tokens,
        "seconds": round(seconds, 6),
        "tokens_per_second": round(count / seconds, 3) if seconds > 0 else None,
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


def _wanted(
    json_schema: str | None, regex: str | None, choices: tuple[str, ...]
) -> tuple[str, StructuredOutput] | None:
    """What the text must be, and the option that says so. Raises InputError for two of them, or one that is wrong."""
    given = [
        option
        for option, value in (("--json-schema", json_schema), ("--regex", regex), ("--choice", choices or None))
        if value is not None
    ]
    if not given:
        return None
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} both say what the text must be; leave one out")
    try:
        if json_schema is not None:
            return given[0], StructuredOutput("json_schema", _read_schema(json_schema))
        if regex is not None:
            return given[0], StructuredOutput("regex", regex)
        return given[0], StructuredOutput("choice", choices=choices)
    except InputError as error:
        raise InputError(f"{given[0]}: {error}") from None


def _read_schema(schema: str) -> str:
    """`schema` itself if it is a JSON object, or else what the file of that name holds."""
    if schema.lstrip().startswith("{"):
        return schema
    try:
        with Path(schema).open("rb") as file:
            return file.read(4 * MAX_TEXT + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"the file {cut(schema)!r} cannot be read ({reason}); name a file, or write the schema"
        ) from None


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
