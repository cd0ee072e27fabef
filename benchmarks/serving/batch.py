"""`gpt2-bundle batch` compared with the server at 16 clients: python -m benchmarks.serving.batch BUNDLE --output FILE.

Both take turns on requests of the same sizes. The batch's rate is that between its first and its last answer, so
loading is not in it, and the last requests, which end alone, are.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.own_server import SERVE, OwnServer
from benchmarks.common.standalone import measurement, run, say
from benchmarks.serving.load import draw_prompt, load
from serving.bundle import Bundle

_BATCH = [*SERVE[:-1], "batch"]
_LOOK = 0.02


def answered(bundle: Path, graph: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Answer `bodies` as a batch: seconds between its first and last answer, tokens a second between them, errors."""
    with tempfile.TemporaryDirectory() as folder:
        requests, answers = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        with requests.open("w", encoding="utf-8") as file:
            for number, body in enumerate(bodies):
                line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        process = subprocess.Popen([*_BATCH, str(bundle), str(requests), str(answers), "--graph", graph])
        first = last = size = early = 0.0
        while process.poll() is None or size != answers.stat().st_size:
            time.sleep(_LOOK)
            found = answers.stat().st_size if answers.exists() else 0
            if found != size:
                size, last = found, time.perf_counter()
                if not first:
                    first, early = last, found
        data = answers.read_bytes()
    whole = [json.loads(line) for line in data.splitlines()]
    before = [json.loads(line) for line in data[: int(early)].splitlines(keepends=True) if line.endswith(b"\n")]
    tokens, seconds = _tokens(whole) - _tokens(before), last - first
    errors = sum(answer["error"] is not None or answer["response"]["status_code"] != 200 for answer in whole)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None, "errors": errors}


def _tokens(answers: list[dict[str, Any]]) -> int:
    bodies = (answer["response"]["body"] for answer in answers if answer["response"])
    return sum(body["usage"]["completion_tokens"] for body in bodies if "usage" in body)


@measurement(requests=256, seconds=20.0, repeats=3, prompt_tokens=64, new_tokens=96)
def main(
    bundle: Bundle, graph: str, requests: int, seconds: float, repeats: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Measure on the folder BUNDLE."""
    asked = {"clients": 16, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    # What the load generator asks for, but for the stream.
    fields = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    rounds = []
    for repeat in range(repeats):
        draw = random.Random(repeat)
        bodies = [{"prompt": draw_prompt(draw, prompt_tokens), **fields} for _ in range(requests)]
        done: dict[str, Any] = {"batch": answered(bundle.folder, graph, bodies)}
        with OwnServer(bundle.folder, graph) as server:
            load(server.url, seconds=2, **asked)
            done["server"] = load(server.url, seconds=seconds, seed=repeat + 1, **asked)
        rounds.append(done)
        say(done)
    rates = {name: median([done[name]["tokens_per_second"] for done in rounds]) for name in ("batch", "server")}
    return {"rounds": rounds, "tokens_per_second": rates, "batch_over_server": rates["batch"] / rates["server"]}


if __name__ == "__main__":
    run(main)
