"""`--graph auto`: measures which precision and thread count generate fastest here, and remembers the answer.

The order of the candidates is the order of preference: higher precision first, and the usual thread count first. A
later candidate replaces an earlier one only if it is clearly faster (docs/decisions/autotune.md).
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, get_args

from serving.backends import loader, tuning_cache
from serving.backends.generation_rate import generation_rate
from serving.backends.prefill_graph import AUTO as AUTO_PREFILL
from serving.backends.prefill_graph import SAME
from serving.bundle import Bundle
from serving.bundle.certificate import VERIFIED, variant_statuses
from serving.bundle.manifest import Precision, to_json
from serving.errors import GPT2BundleError, InputError
from serving.support.cores import cpu_model, thread_counts, usable_cores
from serving.support.suggestions import did_you_mean

AUTO = "auto"
SECONDS = 20.0
"""Time of all measurements together. A graph that is loading when it ends is loaded to its end."""
_MARGIN = 1.05
_PRECISIONS = ("fp32", "int8", "int4")
"""From the best quality down; the processor has no kernels for 16 bits, so those graphs are not candidates."""

log = logging.getLogger("gpt2_bundle.autotune")


@dataclass(frozen=True)
class Setting:
    """One candidate. A further thing to choose is a further field, and a row of `Autotuner.options`."""

    graph: str
    threads: int

    def __str__(self) -> str:
        return f"{self.graph} with {self.threads} thread{'s' if self.threads > 1 else ''}"


Measure = Callable[[Bundle, str, int, int], float]


def autotuner(
    graph: str | None,
    *,
    runtime: str = "onnx",
    devices: Sequence[str] = ("cpu",),
    threads: int | None = None,
    batch_size: int = 1,
    replicas: int = 1,
    prefill_graph: str = AUTO_PREFILL,
    say: Callable[[str], None] = log.info,
) -> Autotuner | None:
    """What chooses for `graph` "auto" or "auto:PRECISION"; None for any other graph.

    Raises InputError for an unknown precision, for numbers below 1, for a named prefill graph, and for another runtime
    or device than the processor in ONNX Runtime.
    """
    name, colon, precision = (graph or "").partition(":")
    if name != AUTO:
        return None
    if colon and precision not in get_args(Precision):
        raise InputError(f"--graph {graph}: no precision {precision!r}{did_you_mean(precision, _PRECISIONS)}")
    if runtime != "onnx" or any(device != "cpu" for device in devices):
        raise InputError("--graph auto chooses for ONNX Runtime on the processor; name a graph for other devices")
    if prefill_graph not in (AUTO_PREFILL, SAME):
        raise InputError(
            f"--graph {graph} chooses the graph; ask for --prefill-graph auto or same, not {prefill_graph}"
        )
    for what, value in (("threads", threads), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024):
            raise InputError(f"{what} is {value!r}; it must be an integer from 1 to 1024")
    return Autotuner(
        precision or "fp32",
        threads=threads,
        batch_size=batch_size,
        replicas=replicas,
        prefill_graph=prefill_graph,
        say=say,
    )


class Autotuner:
    """Chooses a graph and a thread count for bundles.

    Args:
        lowest: the lowest precision that the caller accepts; "fp32" leaves nothing to choose but threads.
        threads: the thread count, if the caller has decided it.
        batch_size: sequences that decode together.
        replicas: engines that share the cores.
        prefill_graph: "auto" or "same", which each graph is measured with.
        say: called with each line for the user.
        measure, clock: how a candidate is measured, and the time in seconds.
    """

    def __init__(
        self,
        lowest: str,
        *,
        threads: int | None = None,
        batch_size: int = 1,
        replicas: int = 1,
        prefill_graph: str = AUTO_PREFILL,
        say: Callable[[str], None] = log.info,
        measure: Measure | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lowest, self._threads, self._batch_size, self._replicas = lowest, threads, batch_size, replicas
        self._say, self._clock, self._prefill_graph = say, clock, prefill_graph
        # Looked up by name: tests replace it.
        self._measure = measure or (
            lambda bundle, graph, threads, size: generation_rate(bundle, graph, threads, size, prefill_graph)
        )
        self._settled: Setting | None = None

    def graphs(self, bundle: Bundle) -> dict[str, str | None]:
        """Graphs of an accepted precision, best quality first, each with why it may not be chosen, or None.

        fp32 is what the certificate proves equal to the model. Any other graph is a candidate only if the certificate
        names it as verified.
        """
        rank = {precision: index for index, precision in enumerate(get_args(Precision))}
        accepted = [name for name in _PRECISIONS if rank[name] <= rank[self._lowest]]
        found = {
            name: graph.precision
            for name, graph in bundle.manifest.graphs.items()
            if graph.runtime == "onnx" and graph.cache == "shared-buffer" and graph.precision in accepted
        }
        if "fp32" not in found.values():
            raise InputError(f"{bundle.folder}: the bundle has no fp32 graph to begin with; name one by --graph")
        statuses = variant_statuses(bundle) | {name: VERIFIED for name in found if found[name] == "fp32"}
        problems = {name: statuses.get(name, "not in the certificate") for name in found}
        return {
            name: None if problems[name] == VERIFIED else problems[name]
            for name in sorted(found, key=lambda name: accepted.index(found[name]))
        }

    def options(self, bundle: Bundle) -> dict[str, list[Any]]:
        """The values of each field of `Setting`, in the order of preference."""
        graphs = [name for name, problem in self.graphs(bundle).items() if problem is None]
        return {"graph": graphs, "threads": [self._threads] if self._threads else thread_counts(self._replicas)}

    def choose(self, bundle: Bundle) -> Setting:
        """The setting for `bundle`, measured or remembered, and say so.

        After the first bundle, which may be serving by then, no measurement runs: the setting stays where the next
        bundle has it.
        """
        options = self.options(bundle)
        if self._settled is not None:
            graph = self._settled.graph if self._settled.graph in options["graph"] else options["graph"][0]
            self._settled = replace(self._settled, graph=graph)
            self._say(f"auto: {self._settled}, as measured for the version before")
            return self._settled
        question = self._question(bundle, options)
        found, how = _remembered(tuning_cache.read(question), options), "remembered"
        if found is None:
            rates = self._rates(bundle, options)
            found, how = (rates, datetime.now(UTC).date().isoformat()), "measured"
            if any(rates.values()):
                how += _store(question, *found)
        self._settled = best(found[0])
        self._say(self._line(bundle, options, *found, how))
        return self._settled

    def _question(self, bundle: Bundle, options: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        with loader.runtime_errors("onnx"):
            from serving.backends.onnx_session import runtime_version
        return {
            "schema": 1,
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "onnxruntime": runtime_version(),
            "manifest_sha256": hashlib.sha256(to_json(bundle.manifest).encode()).hexdigest(),
            "batch_size": self._batch_size,
            "replicas": self._replicas,
            "prefill_graph": self._prefill_graph,
            "options": {name: list(values) for name, values in options.items()},
        }

    def _rates(self, bundle: Bundle, options: Mapping[str, Sequence[Any]]) -> dict[Setting, float]:
        """Tokens/s of the measured settings, in the order in which they were measured; 0 for one that failed."""
        first = Setting(**{name: values[0] for name, values in options.items()})
        if all(len(values) == 1 for values in options.values()):
            return {first: 0.0}
        self._say(f"auto: measuring the fastest of {_listed(options)} here, at most {SECONDS:.0f} s, once")
        began, longest = self._clock(), 0.0

        def rate(setting: Setting) -> float | None:
            nonlocal longest
            start = self._clock()
            if setting != first and start - began + longest > SECONDS:
                return None
            try:
                return self._measure(bundle, setting.graph, setting.threads, self._batch_size)
            except GPT2BundleError as error:
                if setting == first:
                    raise
                self._say(f"auto: {setting} does not run here: {error}")
                return 0.0
            finally:
                longest = max(longest, self._clock() - start)

        return search(first, options, rate)

    def _line(
        self,
        bundle: Bundle,
        options: Mapping[str, Sequence[Any]],
        rates: Mapping[Setting, float],
        day: str,
        how: str,
    ) -> str:
        chosen, parts = best(rates), []
        refused = [f"{name} ({problem})" for name, problem in self.graphs(bundle).items() if problem]
        unmeasured = [
            str(value)
            for name, values in options.items()
            for value in values
            if not any(getattr(setting, name) == value for setting in rates)
        ]
        if rates[chosen]:
            shown = ", ".join(f"{setting} {rate:.4g}" for setting, rate in rates.items() if rate)
            parts += [f"auto: {chosen}", f"tokens/s at batch size {self._batch_size}: {shown}"]
            parts.append(how if how != "remembered" else f"remembered from {day}")
        else:
            parts.append(f"auto: {chosen}, the only candidate")
        if unmeasured:
            parts.append(f"no time for {', '.join(unmeasured)}")
        if refused:
            parts.append(f"left out: {', '.join(refused)}")
        return "; ".join(parts)


def search(
    first: Setting, options: Mapping[str, Sequence[Any]], rate: Callable[[Setting], float | None]
) -> dict[Setting, float]:
    """Vary one field after the other from the best setting so far, until nothing is better; the rates on the way.

    `rate` is called once for each setting, and returns None if no time is left.
    """
    rates: dict[Setting, float] = {first: rate(first) or 0.0}
    chosen, moved = first, True
    while moved:
        moved = False
        for name, values in options.items():
            for value in values:
                setting = replace(chosen, **{name: value})
                if setting in rates or (found := rate(setting)) is None:
                    continue
                rates[setting] = found
                if best(rates) != chosen:
                    chosen, moved = setting, True
    return rates


def best(rates: Mapping[Setting, float]) -> Setting:
    """The first of the settings that no later one beats by more than 5 %."""
    chosen = next(iter(rates))
    for setting, rate in rates.items():
        if rate > _MARGIN * rates[chosen]:
            chosen = setting
    return chosen


def _remembered(answer: Any, options: Mapping[str, Sequence[Any]]) -> tuple[dict[Setting, float], str] | None:
    """Rates and date of a stored answer, if it is one to `options`; anything may be in the file."""
    try:
        rates = {Setting(**row["setting"]): float(row["tokens_per_second"]) for row in answer["rates"]}
        day = date.fromisoformat(answer["measured"]).isoformat()
        # JSON's true equals 1, and 2.0 equals 2.
        known = all(
            value in options[name] and type(value) is type(options[name][0])
            for setting in rates
            for name, value in asdict(setting).items()
        )
        sound = known and max(rates.values(), default=0) > 0 and all(0 <= rate < math.inf for rate in rates.values())
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return (rates, day) if sound else None


def _store(question: dict[str, Any], rates: Mapping[Setting, float], day: str) -> str:
    """Remember the rates; what to say about it."""
    rows = [{"setting": asdict(setting), "tokens_per_second": rate} for setting, rate in rates.items()]
    try:
        return f", remembered in {tuning_cache.write(question, {'measured': day, 'rates': rows})}"
    except OSError as error:
        return f", not remembered ({error.strerror or error})"


def _listed(options: Mapping[str, Sequence[Any]]) -> str:
    words = {"graph": "graphs", "threads": "thread counts"}
    return " and ".join(f"{words[name]} {', '.join(map(str, values))}" for name, values in options.items())
