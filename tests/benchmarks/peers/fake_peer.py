"""A contestant with no model: the next token is the last one plus the row, and it may fail where it is told to."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.protocol import Job, Run, converted, serve


class FakeContestant:
    notes = ("made up",)

    def __init__(self, job: Job) -> None:
        print("a library's chatter")
        if job.precision == "int4":
            raise ValueError("no int4\nhere")
        with converted(Path(job.work) / "fake") as draft:
            if draft is not None:
                (draft / "model").write_text("weights")

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        print("more of it")
        if new_tokens == 13:
            raise SystemExit(3)
        steps = range(new_tokens + 1)
        tokens = [[prompt[-1] + row + step for row, prompt in enumerate(prompts)] for step in steps]
        return Run(0.5, [0.25] * new_tokens, tokens)


if __name__ == "__main__":
    serve(FakeContestant, ("numpy",))
