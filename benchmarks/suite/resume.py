"""Going on with a record of which a run was ended in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.suite.load.schedule import Schedule
from serving.errors import InputError

SUSTAINED = "sustained_requests_per_second"
RATES = ("read_bandwidth_bytes_per_second", "fp32_flops_per_second")


def whole_sweep(schedules: Sequence[Schedule]) -> Schedule:
    """Return one schedule for a sweep, whose hash has all rates, so that only sweeps of the same rates are compared."""
    return Schedule("saturation", "highest rate sustained", {"rates": [each.sha256 for each in schedules]}, ())


def session(about: Mapping[str, Any], rates: tuple[float | None, float | None], others: float | None) -> dict[str, Any]:
    """One run of those that a record was made in. `rates` are bytes and operations a second, `others` a share."""
    told = {name: about[name] for name in ("date", "load_average")}
    return told | dict(zip(RATES, rates, strict=True)) | {"others_cpu_share": others}


def most_of(sessions: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The machine's best rates in any session, and the most that others took in one."""
    names = (*RATES, "others_cpu_share")
    return {name: max((each[name] for each in sessions if each[name] is not None), default=None) for name in names}


class Earlier:
    """The points of an unfinished record, which are not measured again.

    A point is whole or not there: its targets took turns in one run, so that its pairs are pairs still.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self.sessions: list[dict[str, Any]] = list(record["sessions"])

    def check(self, settings: Mapping[str, Any], environment: Mapping[str, Any], targets: Iterable[str]) -> None:
        """Raise InputError unless the record was made as this run makes its own; `targets` are those here or not."""
        before = self._record["environment"]
        named = {each["name"] for each in self._record["targets"]} | set(self._record["not_measured"])
        pairs = {
            "settings": (self._record["settings"], settings),
            "machine": [(each["cpu"], each["cores"]) for each in (before, environment)],
            "versions": (before["versions"], environment["versions"]),
            "targets": (named, set(targets)),
        }
        self._refuse([name for name, (old, new) in pairs.items() if old != new])

    def check_started(self, names: Sequence[str]) -> None:
        """Raise InputError if others have started than then."""
        self._refuse([] if [each["name"] for each in self._record["targets"]] == list(names) else ["targets"])

    def _refuse(self, other: Sequence[str]) -> None:
        if other:
            raise InputError(f"the unfinished record has other {' and '.join(other)}; delete it, or leave out --resume")

    def points(self, schedules: Sequence[Schedule]) -> list[dict[str, Any]]:
        """The points of one schedule, or of the schedules of one sweep; none if they must be measured."""
        last = whole_sweep(schedules) if schedules[0].scenario == "saturation" else schedules[0]
        asked = {each.sha256 for each in schedules} | {last.sha256}
        found = [point for point in self._record["points"] if point["schedule_sha256"] in asked]
        return found if any(point["schedule_sha256"] == last.sha256 for point in found) else []
