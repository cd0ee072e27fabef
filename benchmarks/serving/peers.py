"""Other OpenAI-compatible servers over the same weights, compared with ours: python -m benchmarks.serving.peers BUNDLE.

Each server is a process with an environment of its own; the load generator is one process more. All take turns on the
same load, and those whose turn it is not are stopped, so that a server which spins while nobody asks takes no time from
another. Prompts are texts of as many tokens for everyone. Others are asked for plain completions; ours gives
log-probabilities too, so that every token is an event, as most ids of a small tokenizer have no text.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.common.hardware import busy_seconds, environment, usable_cores
from benchmarks.common.standalone import run
from benchmarks.serving.peer_files import write_folder, write_model
from benchmarks.serving.server import SERVE, load
from serving.errors import GPT2BundleError

_ROOT = Path(__file__).parents[2]
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
    load: Sequence[str]
    note: str
    model: str | None = None


def peers(bundle: Path, precision: str, environments: Path, llama_server: Path | None, work: Path) -> list[Peer]:
    """Ours, and those of the others that are installed; "{port}" is replaced by the port in their commands."""
    graph = f"ort/{precision}"
    ours = [*SERVE, str(bundle), "--graph", graph, "--port", "{port}", "--no-access-log"]
    found = [Peer(OWN, ours, "/health/ready", ["--text"], f"{graph}, 16 slots, with log-probabilities")]
    plain, port = ["--text", "--plain"], ["--port", "{port}", "--host", "127.0.0.1"]
    python = _python(environments, "llama")
    if python is not None:
        model, kind = _gguf(bundle, precision, work), _OUTTYPES[precision].upper()
        options = ["--model", str(model), "--n_ctx", str(_POSITIONS), "--interrupt_requests", "False"]
        options += ["--n_threads", str(usable_cores()), "--n_threads_batch", str(usable_cores()), "--verbose", "False"]
        if precision == "fp32":
            options += ["--type_k", "0", "--type_v", "0"]
        note = f"{kind}; one request at a time, the others wait"
        found.append(
            Peer(
                "llama-cpp-python", [str(python), "-m", "llama_cpp.server", *options, *port], "/v1/models", plain, note
            )
        )
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
        found.append(Peer("transformers", command, "/health", plain, note, str(folder.absolute())))
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
    found: Sequence[Peer], clients: Sequence[int], seconds: float, repeats: int, sizes: Sequence[str], work: Path
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
                click.echo(str(error), err=True)
                continue
            stack.callback(server.kill)
            server.rest()
            servers.append(server)
        for repeat in range(repeats + 1):
            for count in clients:
                for server in servers[repeat % len(servers) :] + servers[: repeat % len(servers)]:
                    done = _round(server, count, seconds if repeat else min(2.0, seconds), repeat, sizes)
                    click.echo(f"{done['server']}, {count} clients: {_line(done)}", err=True)
                    if repeat:
                        rounds.append(done)
    return {"rounds": rounds, "failed": failed}


def _round(server: PeerServer, count: int, seconds: float, seed: int, sizes: Sequence[str]) -> dict[str, Any]:
    peer = server.peer
    options = ["--clients", str(count), "--seconds", str(seconds), "--seed", str(seed), *sizes, *peer.load]
    if peer.model:
        options += ["--model", peer.model]
    with server.round():
        before, began = busy_seconds(), time.perf_counter()
        result = load(server.url, options)
        busy = (busy_seconds() - before) / (time.perf_counter() - began) / usable_cores()
    return {"server": peer.name, "clients": count, "busy_cores_share": busy, **result}


def _line(done: dict[str, Any]) -> str:
    gaps, first = done["inter_token_s"] or {}, done["time_to_first_token_s"] or {}
    times = [
        f"{name} {1e3 * value:.1f} ms"
        for name, value in (*gaps.items(), *(("first " + k, v) for k, v in first.items()))
    ]
    return f"{done['tokens_per_second']:.0f} tokens/s, {', '.join(times)}, {done['outcomes']}"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision", type=click.Choice(list(_OUTTYPES)), default="int8", show_default=True, help="Of the weights."
)
@click.option("--environments", type=click.Path(path_type=Path), default=Path(), help="Where .venv-peer-NAME lie.")
@click.option("--llama-server", type=click.Path(path_type=Path, exists=True), help="llama.cpp's own server.")
@click.option("--only", help="Names of servers to compare with ours, with commas; all that are installed by default.")
@click.option("--clients", default="1,4,16", show_default=True, help="Numbers of streaming clients.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each turn.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/bench-serving-peers"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path,
    precision: str,
    environments: Path,
    llama_server: Path | None,
    only: str | None,
    clients: str,
    seconds: float,
    repeats: int,
    prompt_tokens: int,
    new_tokens: int,
    work: Path,
    output: Path | None,
) -> None:
    """Measure on the folder BUNDLE."""
    # So that the servers, each a group of its own, end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work.mkdir(parents=True, exist_ok=True)
    found = peers(bundle, precision, environments, llama_server, work)
    if only is not None:
        found = [peer for peer in found if peer.name in (OWN, *only.split(","))]
    sizes = ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    counts = [int(count) for count in clients.split(",")]
    record = {
        "environment": environment(),
        "precision": precision,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "servers": {peer.name: peer.note for peer in found},
        **compare(found, counts, seconds, repeats, sizes, work),
    }
    text = json.dumps(record, indent=1)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
