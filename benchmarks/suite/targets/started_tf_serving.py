"""TensorFlow Serving started for the run: its binary, or its official container, on a deployment made for it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite.targets.tf_serving import connect
from serving.bundle import Bundle
from serving.clients.transport import Transport
from serving.deploy.tf_serving import IMAGE_VERSION, write_tf_serving
from serving.deploy.tf_serving_config import ServerOptions
from serving.errors import InputError, RuntimeMissingError, ServerError

VARIABLE, BINARY = "TENSORFLOW_MODEL_SERVER", "tensorflow_model_server"
_VERSION = re.compile(r"TensorFlow ModelServer: (\S+)")
# Seconds: to load and warm a model, to end, for a question to a container engine or to a binary.
_START, _STOP, _ASK = 180.0, 20.0, 30.0
_REST_SECONDS = 600.0


@dataclass(frozen=True)
class FoundServer:
    """What serves: a binary or a container engine. `emulator` is a binary that is not TensorFlow Serving's."""

    command: str
    container: bool
    label: str
    emulator: bool = False


def image(gpu: bool = False) -> str:
    """The official image that `gpt2-bundle deploy` names, for processors or for GPUs."""
    return f"tensorflow/serving:{IMAGE_VERSION}{'-gpu' if gpu else ''}"


def find_server(gpu: bool = False) -> FoundServer:
    """The binary of TENSORFLOW_MODEL_SERVER or PATH, else docker or podman with the official image already here.

    Raises RuntimeMissingError, with what there is to do, if there is neither.
    """
    named = os.environ.get(VARIABLE)
    binary = shutil.which(named or BINARY)
    if binary is not None:
        # A server says "TensorFlow ModelServer: 2.x" first of all; whatever does not is something else.
        said = _ask([binary, "--version"])
        version = _VERSION.search(said or "")
        if version is not None:
            return FoundServer(binary, False, f"tensorflow_model_server {version[1]}")
        return FoundServer(binary, False, f"{Path(binary).name}, which is not TensorFlow ModelServer", True)
    if named:
        raise RuntimeMissingError(f"{VARIABLE} names {named!r}, which is no program; name one, or unset it")
    engines = [engine for engine in ("docker", "podman") if shutil.which(engine) and _ask([engine, "info"]) is not None]
    for engine in engines:
        if _ask([engine, "image", "inspect", image(gpu)]) is not None:
            return FoundServer(engine, True, f"{image(gpu)} in {engine}")
    if engines:
        raise RuntimeMissingError(f"the image {image(gpu)} is not on this machine; run: {engines[0]} pull {image(gpu)}")
    raise RuntimeMissingError(
        f"{BINARY} is not on this machine (PATH, or {VARIABLE}), and no container engine is; "
        "name one that runs elsewhere, as tfserving=HOST:PORT"
    )


class TFServingProcess:
    """TensorFlow Serving with a bundle's SavedModel as `gpt2-bundle deploy` writes it, on free ports of this machine.

    Args:
        name: what errors begin with.
        how: by which protocol its readiness is asked, "grpc" or "rest".
        gpu: whether a container is given the GPUs, by the image for them.
        own_session: whether signals of this process's terminal and group do not reach it.
    """

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        found: FoundServer,
        how: str,
        *,
        gpu: bool = False,
        own_session: bool = True,
    ) -> None:
        self.pid: int | None = None
        self._name, self._bundle, self._found, self._how = name, bundle, found, how
        self._gpu, self._own_session = gpu, own_session
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._container = f"gpt2-bundle-bench-{secrets.token_hex(4)}"

    def start(self) -> str:
        """Deploy, start, wait until the model is AVAILABLE, and return the address of the protocol.

        Raises ServerError with the log's last words; `stop` is to be called then too.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="gpt2-bundle-tfserving-"))
        deployment = self._deploy(self._folder / "deployment")
        grpc_port, rest_port = _free_ports()
        command = (self._in_container if self._found.container else self._as_binary)(deployment, grpc_port, rest_port)
        with (self._folder / "log").open("wb") as log:
            self._process = process = subprocess.Popen(
                command,
                env=os.environ | {VARIABLE: self._found.command},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the suite, which then stops it.
                start_new_session=self._own_session,
            )
        address = f"127.0.0.1:{grpc_port if self._how == 'grpc' else rest_port}"
        self._wait(process, address)
        # A container's first process is no server's, or is in a virtual machine.
        self.pid = None if self._found.container else process.pid
        return address

    def stop(self) -> None:
        """End it, and take the deployment away. May be called without `start`."""
        process, self._process, self.pid = self._process, None, None
        if process is not None:
            if self._found.container:
                _ask([self._found.command, "stop", "--time", "10", self._container])
            self._end(process)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, to all that it started where it has a session of its own, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                if self._own_session:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP)
                return

    def connect(self, address: str) -> Transport:
        """Speak to the model."""
        return connect(self._how, address, self._bundle.manifest.name)

    def _deploy(self, destination: Path) -> Path:
        """Write the deployment; a copy of the SavedModel only where its path cannot be written into a script."""
        options = ServerOptions(_REST_SECONDS)
        try:
            return write_tf_serving(self._bundle, destination, options, copy=False).folder
        except InputError:
            return write_tf_serving(self._bundle, destination, options).folder

    def _as_binary(self, deployment: Path, grpc_port: int, rest_port: int) -> list[str]:
        return [str(deployment / "run.sh"), f"--port={grpc_port}", f"--rest_api_port={rest_port}"]

    def _in_container(self, deployment: Path, grpc_port: int, rest_port: int) -> list[str]:
        model, source = self._bundle.manifest.name, (self._bundle.folder / "savedmodel").resolve()
        flags = ["--port=8500", "--rest_api_port=8501", "--model_config_file=/config/models.config"]
        flags += deployment_flags(deployment)
        return [
            # A container's first process does not end by SIGTERM alone; podman's helper for that may be missing.
            self._found.command, "run", "--rm", *(["--init"] if self._found.command == "docker" else []),
            "--name", self._container,
            *(["--gpus", "all"] if self._gpu else []),
            "--publish", f"127.0.0.1:{grpc_port}:8500", "--publish", f"127.0.0.1:{rest_port}:8501",
            "--mount", f"type=bind,source={source},target=/models/{model},readonly",
            "--mount", f"type=bind,source={deployment}/config,target=/config,readonly",
            "--entrypoint", BINARY, image(self._gpu), *flags,
        ]  # fmt: skip

    def _wait(self, process: subprocess.Popen[bytes], address: str) -> None:
        transport, deadline = None, time.monotonic() + _START
        while transport is None or not _available(transport):
            if (code := process.poll()) is not None:
                said = f"the server ended with {code} before it was ready"
            elif time.monotonic() > deadline:
                said = f"no model was AVAILABLE after {_START:g} s"
            else:
                time.sleep(0.1)
                # gRPC waits ever longer before it tries a port again at which nobody listened.
                transport = transport or (self.connect(address) if _listens(address) else None)
                continue
            raise ServerError(f"{self._name}: {said}: {self._last_words()}", "UNAVAILABLE")

    def _last_words(self) -> str:
        """The last lines of the log in one."""
        assert self._folder is not None
        lines = (self._folder / "log").read_text(encoding="utf-8", errors="replace").split("\n")
        told = [line.strip() for line in lines if line.strip()][-3:]
        return " / ".join(told)[-600:] or "it said nothing"


def deployment_flags(deployment: Path) -> list[str]:
    """The flags of the deployment's compose file after those of ports and model, as its container takes them."""
    lines = (deployment / "compose.yaml").read_text(encoding="utf-8").split("\n")
    flags = [line.strip()[3:-1] for line in lines if line.strip().startswith('- "--')]
    own = ("--port=", "--rest_api_port=", "--model_config_file=")
    return [flag for flag in flags if not flag.startswith(own)]


def _available(transport: Transport) -> bool:
    try:
        return any(version["state"] == "AVAILABLE" for version in transport.status(2.0))
    except ServerError:
        return False


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1.0):
        return True
    return False


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _ask(command: list[str]) -> str | None:
    """What a command says, or None if it fails, is not there or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None
