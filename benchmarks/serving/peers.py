"""Other OpenAI-compatible servers over the same weights, compared with ours: python -m benchmarks.serving.peers BUNDLE.

Each server is a process with an environment of its own; the load generator is one process more. All take turns on the
same load, and those whose turn it is not are stopped, so that a server which spins while nobody asks takes no time from
another. Prompts are texts of as many tokens for everyone. Others are asked for plain completions; ours gives
log-probabilities too, so that every token is an event, as most ids of a small tokenizer have no text.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.common.hardware import busy_seconds, usable_cores
from benchmarks.common.own_server import PLAIN, SERVE
from benchmarks.common.standalone import measurement, numbers_of, run, say
from benchmarks.serving.load import load
from benchmarks.serving.peer_files import write_folder, write_model
from serving.bundle import Bundle
from serving.errors import GPT2BundleError

OWN = "gpt2-bundle"
_OUTTYPES = {"int8": "q8_0", "fp32": "f32"}
_POSITIONS, _SLOTS = 1024, 16
_START = 120.0
_PAUSE = 0.3
"""Seconds between turns: a runtime's threads go on spinning for a while after its last call."""


@dataclass(frozen=True)
class Peer:
    """How one server is started, when it is ready, and what its figures must be read with."""

    name: str
    command: Sequence[str]
    ready: str
    load: Mapping[str, Any]
    note: str


def peers(bundle: Path, precision: str, environments: Path, llama_server: Path | None, work: Path) -> list[Peer]:
    """Ours, and those of the others that are installed; "{port}" is replaced by the port in their commands."""
    graph = f"ort/{precision}"
    ours = [*SERVE, str(bundle), "--graph", graph, "--port", "{port}", "--no-access-log", *PLAIN]
    found = [Peer(OWN, ours, "/health/ready", {"text": True}, f"{graph}, 16 slots, with log-probabilities")]
    plain, port = {"text": True, "plain": True}, ["--port", "{port}", "--host", "127.0.0.1"]
    python = _python(environments, "llama")
    if python is not None:
        model, kind = _gguf(bundle, precision, work), _OUTTYPES[precision].upper()
        options = ["--model", str(model), "--n_ctx", str(_POSITIONS), "--interrupt_requests", "False"]
        options += ["--n_threads", str(usable_cores()), "--n_threads_batch", str(usable_cores()), "--verbose", "False"]
        if precision == "fp32":
            options += ["--type_k", "0", "--type_v", "0"]
        note = f"{kind}; one request at a time, the others wait"
        command = [str(python), "-m", "llama_cpp.server", *options, *port]
        found.append(Peer("llama-cpp-python", command, "/v1/models", plain, note))
        if llama_server is not None:
            options = ["--model", str(model), "--ctx-size", str(_SLOTS * _POSITIONS), "--parallel", str(_SLOTS)]
            options += ["--threads", str(usable_cores())]
            if precision == "fp32":
                options += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
            note = f"{kind}; continuous batching, 16 slots"
            found.append(Peer("llama-server", [str(llama_server), *options, *port], "/health", plain, note))
    python = _python(environments, "torch")
    if python is not None and precision == "fp32":
        folder = work / "transformers"
        write_folder(bundle, folder)
        command = [str(python.parent / "transformers"), "serve", str(folder.absolute()), "--device", "cpu", *port]
        note = "fp32; one request at a time, the others wait"
        found.append(Peer("transformers", command, "/health", plain | {"model": folder.absolute()}, note))
    return found


def _python(environments: Path, name: str) -> Path | None:
    python = environments.absolute() / f".venv-peer-{name}" / "bin" / "python"
    return python if python.exists() else None


def _gguf(bundle: Path, precision: str, work: Path) -> Path:
    path = work.absolute() / f"{precision}.gguf"
    if not path.exists():
        write_model(bundle, path, _OUTTYPES[precision])
    return path


class PeerServer:
    """A server of a process group of its own, stopped except in its turns."""

    def __init__(self, peer: Peer, log: Path) -> None:
        """Raises GPT2BundleError if it does not get ready."""
        self.peer = peer
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        command = [part.replace("{port}", port) for part in peer.command]
        settings = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        settings["OMP_NUM_THREADS"] = str(usable_cores())
        if peer.name != OWN:
            settings.pop("PYTHONPATH", None)
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=settings, process_group=0
            )
        began = time.monotonic()
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > began + _START:
                self.kill()
                raise GPT2BundleError(f"{peer.name} did not start; its last words are in {log}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.peer.ready, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Let it run for the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            time.sleep(_PAUSE)
            self._signal(signal.SIGSTOP)

    def rest(self) -> None:
        """Stop it until its turn."""
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it and what it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def compare(
    found: Sequence[Peer], clients: Sequence[int], seconds: float, repeats: int, sizes: Mapping[str, int], work: Path
) -> dict[str, Any]:
    """Turns of every server at each number of clients, the first of which only warms up, in changing order."""
    rounds: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        servers = []
        for peer in found:
            try:
                server = PeerServer(peer, work / f"{peer.name}.log")
            except GPT2BundleError as error:
                failed[peer.name] = str(error)
                say(str(error))
                continue
            stack.callback(server.kill)
            server.rest()
            servers.append(server)
        for repeat in range(repeats + 1):
            for count in clients:
                for server in servers[repeat % len(servers) :] + servers[: repeat % len(servers)]:
                    done = _round(server, count, seconds if repeat else min(2.0, seconds), repeat, sizes)
                    say(f"{done['server']}, {count} clients: {_line(done)}")
                    if repeat:
                        rounds.append(done)
    return {"rounds": rounds, "failed": failed}


def _round(server: PeerServer, count: int, seconds: float, seed: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    with server.round():
        before, began = busy_seconds(), time.perf_counter()
        result = load(server.url, clients=count, seconds=seconds, seed=seed, **sizes, **server.peer.load)
        busy = (busy_seconds() - before) / (time.perf_counter() - began) / usable_cores()
    return {"server": server.peer.name, "clients": count, "busy_cores_share": busy, **result}


def _line(done: dict[str, Any]) -> str:
    times = {"": done["inter_token_s"], "first ": done["time_to_first_token_s"]}
    told = [
        f"{kind}{name} {1e3 * value:.1f} ms" for kind, each in times.items() for name, value in (each or {}).items()
    ]
    return f"{done['tokens_per_second']:.0f} tokens/s, {', '.join(told)}, {done['outcomes']}"


@measurement(
    click.option("--precision", type=click.Choice(list(_OUTTYPES)), default="int8", show_default=True),
    click.option("--environments", type=click.Path(path_type=Path), default=Path(), help="Where .venv-peer-NAME lie."),
    click.option("--llama-server", type=click.Path(path_type=Path, exists=True), help="llama.cpp's own server."),
    click.option("--work", type=click.Path(path_type=Path), default=Path("runs/bench-serving-peers"),
                 show_default=True, help="For converted weights and logs."),
    graph=None, clients="1,4,16", seconds=8.0, repeats=2, prompt_tokens=64, new_tokens=96,
)  # fmt: skip
def main(
    bundle: Bundle, precision: str, environments: Path, llama_server: Path | None, work: Path, clients: str,
    seconds: float, repeats: int, **sizes: int,
) -> dict[str, Any]:  # fmt: skip
    """Compare the servers that are installed on the folder BUNDLE."""
    # So that the servers, each a group of its own, end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work.mkdir(parents=True, exist_ok=True)
    found = peers(bundle.folder, precision, environments, llama_server, work)
    notes = {peer.name: peer.note for peer in found}
    return {"servers": notes, **compare(found, numbers_of(clients), seconds, repeats, sizes, work)}


if __name__ == "__main__":
    run(main)
