"""A runtime with no model: the next token is the last one plus the row, and it fails where it is told to."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.static_batch import BatchRun, LoadRequest, converted, serve


class FakeRunner:
    notes = ("made up",)
    emulator = True

    def __init__(self, request: LoadRequest) -> None:
        print("a library's chatter")
        if request.precision == "int4":
            raise ValueError("no int4\nhere")
        with converted(Path(request.work) / "fake") as draft:
            if draft is not None:
                (draft / "model").write_text("weights")

    def run(self, prompts: list[list[int]], new_tokens: int) -> BatchRun:
        print("more of it")
        if new_tokens == 13:
            raise SystemExit(3)
        steps = range(new_tokens + 1)
        tokens = [[prompt[-1] + row + step for row, prompt in enumerate(prompts)] for step in steps]
        return BatchRun(0.5, [0.25] * new_tokens, tokens)


if __name__ == "__main__":
    serve(FakeRunner, ("numpy",))
