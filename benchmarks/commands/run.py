"""`gpt2-bundle bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from benchmarks.commands.records import compare_records, gate, selftest
from benchmarks.commands.scenarios import check_output, run_scenarios
from serving.commands.param_types import BundlePath, Number
from serving.errors import InputError

_SCENARIOS = ("steps", "single", "offline", "server", "concurrency", "saturation", "cold-start")
_COUNTED = ("single", "offline", "server", "concurrency")
# Which scenarios read an option, where not all do.
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("batch_sizes", "prompt_tokens", "new_tokens"), ("steps",)),
    **dict.fromkeys(("prompt_lengths", "output_lengths"), (*_COUNTED, "saturation", "cold-start")),
    **{"requests": _COUNTED, "rates": ("server",), "arrivals": ("server", "saturation")},
    **{"clients": ("concurrency",), "cold_starts": ("cold-start",), "trace": ("server",)},
    "price_per_hour": (*_COUNTED, "saturation"),
    **dict.fromkeys(("sweep_from", "sweep_factor", "sweep_seconds", "sweep_limit"), ("saturation",)),
}
# What a trace says for the scenario server.
_TRACED = ("requests", "rates", "arrivals")
_POSITIVE = Number(0, min_open=True)


class _BundleFirst(click.Group):
    """A group whose command is `run` where the first argument is no command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_BundleFirst)
def bench() -> None:
    """Measure a bundle: `gpt2-bundle bench BUNDLE` is short for `bench run BUNDLE`."""


# fmt: off
@bench.command()
@click.argument("bundle", type=BundlePath())
@click.option("--target", "targets", multiple=True, metavar="NAME",
              help="Measure this target: a graph of the bundle (ort/fp32, onnx/portable), savedmodel, slots, "
              "engine=GRAPH, server=GRAPH (starts gpt2-bundle serve), any GRAPH+same (prefills for itself, where "
              "another graph would), tfserving (starts TensorFlow Serving), "
              "tfserving=HOST:PORT, openai=URL, triton=URL/MODEL and others (docs/bench-format.md). Repeatable; "
              "by default all that this machine can run.")
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice((*_SCENARIOS, "all")),
              help="Measure this scenario: steps are prefill and decode of static batches, the others play requests. "
              "Repeatable.  [default: steps]")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True,
              help="Measure each target this many times, in turns; verdicts need five.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1, 4096), default=(1, 4, 16),
              show_default=True, help="Number of rows of a static batch in steps; repeatable.")
@click.option("--prompt-tokens", type=click.IntRange(1),
              help="Length of each prompt in steps.  [default: 128, or what fits]")
@click.option("--new-tokens", type=click.IntRange(1),
              help="Number of decode steps of a repeat in steps.  [default: 32, or what fits]")
@click.option("--requests", type=click.IntRange(1, 1_000_000), default=16, show_default=True,
              help="Number of requests of each schedule.")
@click.option("--prompt-lengths", metavar="LENGTH",
              help="Draw prompt lengths: 64, 16-128 (uniform) or log:16-128 tokens.")
@click.option("--output-lengths", metavar="LENGTH", help="Draw output lengths, written in the same way.")
@click.option("--rate", "rates", multiple=True, type=_POSITIVE, default=(4.0,), show_default=True,
              help="Requests a second in server; repeatable.")
@click.option("--arrivals", type=click.Choice(("poisson", "gamma", "constant")), default="poisson", show_default=True,
              help="Distribution of the gaps between requests in server and saturation.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Replay the arrival times in FILE in server: seconds, one a line.")
@click.option("--clients", multiple=True, type=click.IntRange(1, 4096), default=(1, 4, 16), show_default=True,
              help="Number of closed-loop clients in concurrency; repeatable.")
@click.option("--sweep-from", type=_POSITIVE, default=1.0, show_default=True, metavar="RATE",
              help="Start saturation at this request rate.")
@click.option("--sweep-factor", type=Number(1, 100, min_open=True), default=2.0, show_default=True,
              help="Factor between consecutive request rates.")
@click.option("--sweep-seconds", type=_POSITIVE, default=2.0, show_default=True, metavar="SECONDS",
              help="Duration of each request rate.")
@click.option("--sweep-limit", type=_POSITIVE, default=120.0, show_default=True, metavar="SECONDS",
              help="Start no further request rate after this time.")
@click.option("--cold-starts", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Number of fresh processes of each target in cold-start.")
@click.option("--max-batch", type=click.IntRange(1, 4096), default=16, show_default=True,
              help="Maximum number of requests in a static batch, and of slots.")
@click.option("--price-per-hour", type=_POSITIVE, metavar="PRICE",
              help="Price of this machine in any currency, for the cost of a million output tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draw the schedules from this seed.")
@click.option("--slo-ttft", type=_POSITIVE, metavar="MS", help="Goodput counts requests within this first-token time.")
@click.option("--slo-tpot", type=_POSITIVE, metavar="MS", help="Goodput counts requests within this time per token.")
@click.option("--slo-e2e", type=_POSITIVE, metavar="MS", help="Goodput counts requests within this end-to-end time.")
@click.option("--emulator", "emulators", multiple=True, metavar="NAME",
              help="Mark the target NAME as an emulator of what it is named after; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the record as JSON to FILE, and reports next to it as .md, .csv and .html.")
@click.option("--resume", is_flag=True,
              help="Continue an interrupted run of the same command from what it has left next to --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as one line of JSON at the end.")
@click.pass_context
def run(
    context: click.Context,
    /,
    bundle: Path,
    targets: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    scenarios: tuple[str, ...],
    **asked: Any,
) -> None:
    """Measure prefill and decode latency of BUNDLE in each runtime, with the roofline bound of this machine.

    With --scenario: play requests against targets, and measure what a client sees.
    """
    named = _SCENARIOS if "all" in scenarios else scenarios or ("steps",)
    _refuse_unread(context, named)
    # Before the measuring, so that no result is lost.
    check_output(output)
    from serving.bundle import open_bundle

    # The record names the bundle by its manifest, so its files must be those: every hash is compared.
    run_scenarios(open_bundle(bundle), targets, output, as_json, scenarios=named, **asked)


# fmt: on


def _refuse_unread(context: click.Context, scenarios: tuple[str, ...]) -> None:
    """Raise InputError for an option that was given and would do nothing in this run."""
    for option in context.command.params:
        name, flag = str(option.name), option.opts[0]
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        readers = _READ_BY.get(name, scenarios)
        if context.params["trace"] and name in _TRACED and set(scenarios) & set(readers) <= {"server"}:
            raise InputError(f"--trace says how many requests arrive and when; leave out {flag}")
        if not set(scenarios) & set(readers):
            raise InputError(f"{flag} is read with --scenario {' or '.join(readers)}; add that, or leave it out")


bench.add_command(compare_records)
bench.add_command(gate)
bench.add_command(selftest)
