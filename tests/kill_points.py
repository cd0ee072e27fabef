"""Kill a build at each step it takes in the file system: python -m tests.kill_points FOLDER [EVERY].

The stages' own work is played by a few files, so that a build takes milliseconds and needs no TensorFlow; stages,
stamps, lock, packaging and publishing are the real ones. Each kill happens in a child of this process, just before
an opening, renaming, linking, making or removing, or just after a file was opened and emptied. EVERY leaves out all
but one step in so many. The last line is JSON: how many kills there were, and what was wrong after them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder.progress import Reporter
from builder.recipe import Recipe, VerifyRecipe
from builder.run_folder import is_done, locked
from builder.stages import pipeline as builds
from serving.bundle import open_bundle
from serving.errors import GPT2BundleError
from tests.closed_form import write_bundle

EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.truncate",
    "os.chmod",
    "ctypes.dlsym",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CERTIFICATE = {
    "prompts": 1, "new_tokens": 1, "runtimes": {}, "greedy": {}, "variants": {}, "left_out": {},
    "perplexity": {"reference": 1.0}, "not_run": [],
}  # fmt: skip


class Quiet(Reporter):
    """Says nothing."""

    def line(self, text: str) -> None:
        """Drop the line."""


def play_stages(folder: Path) -> None:
    """Put stand-ins in the place of the stages' work; `folder`/trained gets a byte for each training."""

    def prepare(recipe: Recipe, target: Path, report: Callable[[str], None], **options: Any) -> None:
        (target / "tokens").mkdir(exist_ok=True)
        (target / "tokens" / "train.bin").write_bytes(b"tokens")

    def train(recipe: Recipe, prepared: Path, target: Path, run_id: str, *rest: Any) -> None:
        assert (prepared / "tokens" / "train.bin").read_bytes() == b"tokens"
        with (folder / "trained").open("ab") as file:
            file.write(b".")
        (target / "model.safetensors").write_bytes(b"weights")
        figures = {"validation_tokens": 5.0, "validation_perplexity": 2.0, "trigram_perplexity": 3.0}
        (target / builds.REPORT).write_text(
            json.dumps(figures | {"loop": "fit", "unigram_perplexity": 4.0, "history": []})
        )

    def export(recipe: Recipe, prepared: Path, trained: Path, draft: Path, *rest: Any) -> None:
        assert (trained / "model.safetensors").read_bytes() == b"weights"
        write_bundle(draft, recipe.name)

    def write_certificate(target: Path, certificate: dict[str, Any], golden: dict[str, Any]) -> None:
        for name, value in (("verification.json", certificate), ("golden.json", golden)):
            (target / name).write_text(json.dumps(value))

    builds.prepare, builds.train = prepare, train  # type: ignore[assignment]
    builds.quality = lambda report: {key: value for key, value in report.items() if key != "history"}
    builds.verify_bundle = lambda *_: (CERTIFICATE, {"expected": []})
    sys.modules["builder.stages.export"] = types.SimpleNamespace(export=export)  # type: ignore[assignment]
    sys.modules["builder.verification.certificate"] = types.SimpleNamespace(  # type: ignore[assignment]
        summary=lambda certificate: {"verified": True}, write_certificate=write_certificate
    )
    sys.modules["builder.stages.model_card"] = types.SimpleNamespace(  # type: ignore[assignment]
        model_card=lambda draft, certificate, quality: "# card\n"
    )


def child(work: Callable[[], None]) -> int:
    """Run `work` in a child process; return how it ended, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(number: int, emptied: bool) -> None:
    """Let this process be killed at its `number`-th step in the file system, from 0."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if event not in EVENTS or (emptied and not writes):
            return
        if left == 0:
            left = -1
            if emptied:
                os.close(os.open(arguments[0], arguments[2]))
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(hook)


def state(destination: Path) -> dict[str, str] | None:
    """What stands under the bundle's name: the hash of each file, or None. Raises if it is not a whole bundle."""
    if not destination.exists():
        return None
    return {item.path: item.sha256 for item in open_bundle(destination).manifest.artifacts}


def problems_at(folder: Path, number: int, emptied: bool, old: Path | None) -> list[str] | None:
    """Kill one build and let it run again; say what was wrong, or None if it ended before its `number`-th step."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dist = folder / "dist"
    before = None
    if old is not None:
        shutil.copytree(old, dist / "new")
        before = state(dist / "new")
    recipe = Recipe(name="new", verify=VerifyRecipe(prompts=1))
    run = builds.Run(recipe, folder / "runs" / "new")

    def work() -> None:
        with locked(run.folder):
            builds.build(run, dist, Quiet())

    def killed() -> None:
        kill_at(number, emptied)
        work()

    code = child(killed)
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise AssertionError(f"the build ended with {code} instead of being killed")
    wrong = []
    try:
        after = state(dist / "new")
        # Exactly the old one, or one of the new recipe.
        if after is None and before is not None:
            wrong.append("the old bundle is gone and the new one is not there")
        if after is not None and after != before and "golden.json" not in after:
            wrong.append("neither the old bundle nor the new one")
    except GPT2BundleError as error:
        wrong.append(f"a folder that is no bundle: {error}")
    others = [entry.name for entry in dist.iterdir() if entry.name != "new"] if dist.exists() else []
    wrong += [f"beside the bundle: {name}" for name in others]
    trained, count = is_done(run.trained, run.train_key()), (folder / "trained")
    times = count.stat().st_size if count.exists() else 0
    if child(work) != 0:
        return [*wrong, "the next build failed"]
    try:
        if (after := state(dist / "new")) is None or "golden.json" not in after:
            wrong.append("the next build did not publish")
    except GPT2BundleError as error:
        wrong.append(f"the next build published no bundle: {error}")
    if trained and count.stat().st_size != times:
        wrong.append("trained again what was trained")
    times = count.stat().st_size
    if child(work) != 0 or count.stat().st_size != times:
        wrong.append("the third build was not a no-op")
    return wrong


def main(folder: Path, every: int) -> None:
    """Try the kills of a first build, and of one that replaces an older bundle."""
    # A killed process loses nothing that it wrote, flushed to disk or not, and flushing takes most of the time.
    os.fsync = lambda descriptor: None
    play_stages(folder / "work")
    old = folder / "old"
    write_bundle(old, "old")
    kills, wrong = 0, []
    for start, (before, emptied) in enumerate([(None, False), (old, False), (None, True), (old, True)]):
        number = start % every
        while (found := problems_at(folder / "work", number, emptied, before)) is not None:
            kills += 1
            kind = "after emptying" if emptied else "before"
            wrong += [f"step {number} ({kind}, {'over' if before else 'no'} old bundle): {line}" for line in found]
            number += every
    print(json.dumps({"kills": kills, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
