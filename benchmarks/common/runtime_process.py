"""The process of one runtime under test: it computes when it is asked, and waits otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.common.static_batch import BatchRun, LoadRequest
from serving.errors import GPT2BundleError

ROOT = Path(__file__).parents[2]
# Seconds from SIGTERM to SIGKILL.
_GRACE = 15.0


class RuntimeProcess:
    """Starts `command`, which speaks `benchmarks.common.static_batch`, and stops it at the end of a `with` block.

    Its other output goes into the file `log`. It sees no GPU unless `gpu` is set. Raises GPT2BundleError for an error
    that it answers, or if it ends.
    """

    def __init__(
        self, name: str, precision: str, command: Sequence[str], log: Path, threads: int, gpu: bool = False
    ) -> None:
        self.name, self.precision, self.log = name, precision, log
        self.emulator = False
        self.versions: dict[str, str] = {}
        self.notes: list[str] = []
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH") if gpu else None)))
        settings = {
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            # TensorFlow would take all of a GPU's memory at once, whatever it needs.
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        }
        environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": "-1"}) | settings
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                list(command),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # A group of its own, so that a server which it has started ends with it.
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Id of the process, which leads a session."""
        return self._process.pid

    def kill(self) -> None:
        """End the process and all that it started; a request that waits for it fails.

        The process gets time to end what a signal to its group does not reach, such as a container.
        """
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def load(self, request: LoadRequest) -> None:
        """Load what `request` says; `versions`, `notes` and `emulator` are known afterwards."""
        answer = self._ask({"do": "load", **vars(request)})
        self.versions, self.notes, self.emulator = answer["versions"], answer["notes"], answer["emulator"]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `benchmarks.common.static_batch.BatchRunner.run`."""
        return BatchRun(**self._ask({"do": "run", "prompts": prompts, "new_tokens": new_tokens}))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        # If the process has ended, its last words are in the log.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise GPT2BundleError(f"{self.name} ended with {self._process.wait()}; its last words are in {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise GPT2BundleError(f"{self.name}: {answer['error']}")
        return answer
