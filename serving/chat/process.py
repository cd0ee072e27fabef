"""The parent's side of a process that renders a template: starts it, asks it, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.chat import worker
from serving.errors import GPT2BundleError, InputError, RuntimeMissingError

WALL_SECONDS = 30.0
"""For one answer; far above the worker's processor time, so that only a machine with no time left gets there."""
_MAX_ANSWER = 16 << 20
_CLOSED = (BrokenPipeError, ConnectionResetError, EOFError)


class TemplateError(InputError):
    """The chat template refuses the messages, fails, or takes too much. The message is a sentence about it."""


class RendererBusyError(GPT2BundleError):
    """The machine has no time to render a template now; another try may succeed."""


class TemplateProcess:
    """One worker with one compiled template. After any error but `keeps` it is of no use any more."""

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        """Raises TemplateError for a template that does not compile within its limits, and RuntimeMissingError."""
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(WALL_SECONDS)
        # Of the environment only what finds jinja2 and tells the time: no keys.
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TZ": os.environ.get("TZ", "")}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", "-s", "-X", "utf8", str(Path(worker.__file__))],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={key: value for key, value in environment.items() if value},
                start_new_session=True,
            )
        try:
            self._compiled = self.ask({"template": template, "special": dict(special)}, worker.COMPILE_SECONDS)
        except BaseException:
            self.close()
            raise

    def ask(self, job: Mapping[str, Any], seconds: float = worker.RENDER_SECONDS) -> Any:
        """The worker's answer to `job`. Raises TemplateError, and RendererBusyError after WALL_SECONDS.

        `alive` says afterwards whether the process can take another job.
        """
        try:
            data = json.dumps(job).encode()
            self._socket.sendall(worker.LENGTH.pack(len(data)) + data)
            (size,) = worker.LENGTH.unpack(self._receive(worker.LENGTH.size))
            if size > _MAX_ANSWER:
                raise EOFError
            answer = json.loads(self._receive(size))
        except TimeoutError:
            self.close()
            raise RendererBusyError("the machine has no time to render a chat template now; try again") from None
        except _CLOSED:
            raise TemplateError(f"the chat template of this model {self._end(seconds)}") from None
        except BaseException:
            self.close()
            raise
        if answer.get("missing"):
            self.close()
            raise RuntimeMissingError("chat templates need jinja2; run: pip install 'gpt2-bundle[serve]'")
        if "error" in answer:
            if answer.get("fatal"):
                self.close()
            raise TemplateError(f"the chat template of this model {answer['error']}")
        return answer["value"]

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _end(self, seconds: float) -> str:
        """Why the process ended, as the end of a sentence."""
        self.close()
        if self._process.returncode == -signal.SIGPROF:
            return f"takes more than {seconds:g} s of processor time"
        return f"ended its process (status {self._process.returncode})"

    @property
    def alive(self) -> bool:
        """Whether another job can be given."""
        return self._process.returncode is None

    def close(self) -> None:
        """End the process; may be called more than once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._process.returncode is None:
            # It may be ending by itself, and then says by which signal.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
