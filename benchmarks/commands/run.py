"""`gpt2-bundle bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from benchmarks.commands.scenarios import check_output, compare_records, gate, run_scenarios, selftest
from serving.commands.param_types import Number
from serving.errors import InputError

_SCENARIOS = ("steps", "single", "offline", "server", "concurrency", "saturation", "grid", "cold-start")
_ARRIVALS = ("poisson", "gamma", "constant", "trace")
_COUNTED = ("single", "offline", "server", "concurrency", "grid")
_TIMED = ("server", "saturation")
# Which scenarios read an option, where not all do; the first three are for prefill and decode without a scenario too.
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("batch_sizes", "prompt_tokens", "new_tokens"), ("steps",)),
    **dict.fromkeys(("prompt_lengths", "output_lengths"), (*_COUNTED, "saturation", "cold-start")),
    **{"requests": _COUNTED, "rates": ("server",), "arrivals": _TIMED, "trace": ("server",)},
    **{"clients": ("concurrency",), "cold_starts": ("cold-start",)},
    **dict.fromkeys(("grid_prompts", "grid_outputs"), ("grid",)),
    **dict.fromkeys(("sweep_from", "sweep_factor", "sweep_seconds", "sweep_limit"), ("saturation",)),
}
_ANYWHERE = ("bundle", "targets", "repeats", "output", "as_json")
# A schedule that is read says all that these would: they draw one.
_DRAWING = (set(_READ_BY) - {"cold_starts", "sweep_limit"}) | {"scenarios", "seed"}


class _BundleFirst(click.Group):
    """A group whose command is `run` where the first argument is no command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_BundleFirst)
def bench() -> None:
    """Measure a bundle: `gpt2-bundle bench BUNDLE` is short for `bench run BUNDLE`."""


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A graph of the bundle (ort/fp32, "
              "onnx/portable) or savedmodel; with a scenario also slots, engine=GRAPH, "
              "server=GRAPH (our server, started for it), tfserving (TensorFlow Serving, started "
              "for it), tfserving=HOST:PORT, openai=URL, triton=URL/MODEL and others (docs/bench-format.md); "
              "repeatable. All that is here by default.")  # fmt: skip
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1, 4096), default=(1, 4, 16),
              show_default=True, help="Rows at once; repeatable.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), help="Tokens of each prompt; 128 by default, or what fits.")
@click.option("--new-tokens", type=click.IntRange(1), help="Decode steps a repeat; 32 by default, or what fits.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds over the targets.")
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice((*_SCENARIOS, "all")),
              help="Play requests, and not only measure prefill and decode, which is steps; repeatable.")  # fmt: skip
@click.option("--schedule", type=click.Path(path_type=Path), metavar="FILE", help="Play schedules that were saved.")
@click.option("--save-schedule", type=click.Path(path_type=Path), metavar="FILE", help="Save the schedules.")
@click.option("--requests", type=click.IntRange(1, 1_000_000),
              help="Requests of each schedule.  [default: 16, or all of a trace]")  # fmt: skip
@click.option("--prompt-lengths", metavar="LENGTH", help="64, 16-128 (uniform) or log:16-128 tokens.")
@click.option("--output-lengths", metavar="LENGTH", help="The same for outputs.")
@click.option("--rate", "rates", multiple=True, type=Number(0, min_open=True), default=(4.0,), show_default=True,
              help="Requests a second, for server; repeatable.")  # fmt: skip
@click.option("--arrivals", type=click.Choice(_ARRIVALS), default="poisson", show_default=True,
              help="For server, and but for a trace for saturation.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Moments in seconds, one a line.")
@click.option("--clients", multiple=True, type=click.IntRange(1, 4096), default=(1, 4, 16), show_default=True,
              help="For concurrency; repeatable.")  # fmt: skip
@click.option("--sweep-from", type=Number(0, min_open=True), default=1.0, show_default=True, metavar="RATE",
              help="First rate of saturation, requests a second.")  # fmt: skip
@click.option("--sweep-factor", type=Number(1, 100, min_open=True), default=2.0, show_default=True, help="From one rate to the next.")
@click.option(
    "--sweep-seconds", type=Number(0, min_open=True), default=2.0, show_default=True, help="That each rate lasts for a target."
)
@click.option("--sweep-limit", type=Number(0, min_open=True), default=120.0, show_default=True, metavar="SECONDS",
              help="No further rate is begun after this time.")  # fmt: skip
@click.option("--grid-prompt", "grid_prompts", multiple=True, type=click.IntRange(1), metavar="TOKENS",
              help="For grid; repeatable.")  # fmt: skip
@click.option("--grid-output", "grid_outputs", multiple=True, type=click.IntRange(1), metavar="TOKENS",
              help="For grid; repeatable.")  # fmt: skip
@click.option("--cold-starts", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Fresh processes of each target, for cold-start.")  # fmt: skip
@click.option("--price-per-hour", type=Number(0, min_open=True), metavar="PRICE",
              help="Of this machine, in any currency, for the cost of a million tokens.")  # fmt: skip
@click.option("--max-batch", type=click.IntRange(1, 4096), default=16, show_default=True,
              help="Rows of a static batch, with a scenario.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the schedules.")
@click.option(
    "--slo-ttft",
    type=Number(0, min_open=True),
    metavar="MS",
    help="Goodput counts requests within this time to first token.",
)
@click.option("--slo-tpot", type=Number(0, min_open=True), metavar="MS", help="And within this time per further token.")
@click.option("--slo-e2e", type=Number(0, min_open=True), metavar="MS", help="And within this time in all.")
@click.option("--stand-in", "stand_ins", multiple=True, metavar="NAME", help="Mark a target as a stand-in.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON; with a "
              "scenario also .md, .csv and .html beside it.")  # fmt: skip
@click.option("--resume", is_flag=True, help="With a scenario: go on where a run of the same command was ended, by "
              "what it has left beside --output; from the start if there is nothing.")  # fmt: skip
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
    schedule: Path | None,
    repeats: int,
    batch_sizes: tuple[int, ...],
    prompt_tokens: int | None,
    new_tokens: int | None,
    **asked: Any,
) -> None:
    """Measure prefill and decode latency of BUNDLE, runtime beside runtime, with the floor of this machine.

    With --scenario or --schedule: play requests against targets, and measure what a client sees.
    """
    _refuse_unread(context, scenarios, schedule)
    # Before the measuring, not behind it.
    check_output(output, bool(scenarios or schedule))
    from serving.bundle import open_bundle

    # The record names the bundle by its manifest, so its files must be those: every hash is compared.
    opened = open_bundle(bundle)
    if scenarios or schedule is not None:
        named = _SCENARIOS if "all" in scenarios else scenarios
        steps = {"batch_sizes": batch_sizes, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        asked |= {"scenarios": named, "schedule": schedule, "repeats": repeats, **steps}
        run_scenarios(opened, targets, output, as_json, **asked)
        return
    from benchmarks.common.bundle_targets import load_targets, read_text
    from benchmarks.common.decode_report import print_report
    from benchmarks.common.decode_step import measure

    new_tokens = new_tokens or min(32, opened.manifest.model.n_positions - 1)
    if prompt_tokens is None:
        prompt_tokens = max(1, min(128, opened.manifest.model.n_positions - new_tokens))
    record = measure(
        load_targets(opened, targets),
        opened.manifest.model,
        read_text(opened),
        batch_sizes=batch_sizes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        say=lambda line: click.echo(line, err=True),
    )
    record["bundle"] = opened.manifest.name
    print_report(record)
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(record))


def _refuse_unread(context: click.Context, scenarios: tuple[str, ...], schedule: Path | None) -> None:
    """Raise InputError for an option that was given and would do nothing in this run."""
    given = {
        str(option.name): option.opts[0]
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    }
    if "trace" in given and context.params["arrivals"] != "trace":
        raise InputError("--trace is read with --arrivals trace; add that, or leave it out")
    if "rates" in given and context.params["arrivals"] == "trace":
        raise InputError("--rate has no say in the arrivals of a trace; leave it out")
    for name, flag in given.items():
        if name in _ANYWHERE:
            continue
        if schedule is not None and name in _DRAWING:
            raise InputError(f"{flag} draws a schedule, and --schedule has drawn ones; leave one of them out")
        if schedule is not None or "all" in scenarios:
            continue
        if not scenarios and _READ_BY.get(name) != ("steps",):
            raise InputError(f"{flag} is read with a scenario; add --scenario {_READ_BY.get(name, _SCENARIOS[1:])[0]}")
        if scenarios and not set(scenarios) & set(_READ_BY.get(name, scenarios)):
            raise InputError(f"{flag} is read with --scenario {' or '.join(_READ_BY[name])}; add that, or leave it out")


bench.add_command(compare_records)
bench.add_command(gate)
bench.add_command(selftest)
