"""The soak's verdict: growth is found and noise is not, and each kind of request ends as it says."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import types
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import pytest

from benchmarks.common.own_server import OwnServer
from benchmarks.serving.attacks import attack, attacks_on
from benchmarks.serving.soak import SHARES, Call, ask, draw_call, slope, soak
from serving.entrypoints.http_app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running


def test_a_leak_is_found_and_noise_is_flat() -> None:
    random_numbers = np.random.default_rng(0)
    seconds = np.arange(0, 900, 5.0)
    # Neighbouring samples are alike, as a process's memory is.
    noise = np.convolve(random_numbers.standard_normal(len(seconds) + 7), np.ones(8) / 8, "valid")
    flat = slope(seconds, 400 + noise)
    assert flat.low < 0 < flat.high
    leak = slope(seconds, 400 + noise + seconds / 3600 * 50)
    assert leak.low < 50 < leak.high and leak.low > 20
    assert leak.an_hour == pytest.approx(flat.an_hour + 50)


def test_a_slope_takes_enough_samples() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        slope(range(19), range(19))


def test_every_kind_of_request_ends_as_it_should(tmp_path: Path) -> None:
    engine, draw = DoubleEngine(pace=0.0001), random.Random(0)
    engine.n_positions = 64
    calls: dict[str, Call] = {}
    while len(calls) < len(SHARES):
        call = draw_call(draw, "tiny", 64)
        calls.setdefault(call.kind, call)
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        parts = urlsplit(url)
        address = (parts.hostname or "", parts.port or 0)

        async def all_of_them() -> list[str]:
            return await asyncio.gather(*(ask(address, call) for call in calls.values()))

        outcomes = dict(zip(calls, asyncio.run(all_of_them()), strict=True))
    assert outcomes == {name: "left" if name == "gone" else "as it should be" for name in SHARES}
    engine.close()


def test_a_soak_names_what_is_not_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving.soak._SETTLE", 0.5)
    engine = DoubleEngine(pace=0.0001)
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        server = _Leaking(url)
        result = soak(cast(OwnServer, server), "somebody else", 64, 0.02, 40, bound_mib_an_hour=1e9)
        for descriptor in server.leaked:
            os.close(descriptor)
    engine.close()
    assert result["judged_samples"] >= 20 and not any(name.startswith("memory") for name in result["faults"])
    # The model's name is another one's, so whoever asks for a completion is refused.
    assert any("whole: status 404" in fault for fault in result["faults"])
    assert any("descriptors where there were" in fault for fault in result["faults"])
    assert any(fault == "1 slots are still in use" for fault in result["faults"])


def test_attackers_count_how_their_calls_ended(tmp_path: Path) -> None:
    engine = DoubleEngine(pace=0.0001)
    calls = [
        Call("unknown path", "/nothing", gzip.compress(b"{}"), 404, packed=True),
        Call("unfinished body", "/tokenize", b'{"prompt": "a', leave_after=0.01, length=4000),
    ]
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        found = asyncio.run(attack(url, calls, 0.4, 50, 0))
    engine.close()
    assert set(found["outcomes"]) == {"unknown path: as it should be", "unfinished body: left"} and found["hung"] == 0
    assert len({each.kind for each in attacks_on("tiny")}) == len(attacks_on("tiny")) == 11


class _Leaking:
    """This process as a server's, with a descriptor more at every look."""

    def __init__(self, url: str) -> None:
        self.url, self.process = url, types.SimpleNamespace(pid=os.getpid())
        self.leaked: list[int] = []

    def metric(self, name: str) -> float:
        self.leaked.append(os.open(os.devnull, os.O_RDONLY))
        return 1.0

    def resident_bytes(self) -> Any:
        return 1 << 20
