"""An emulator of MLflow's client: one run in a file of lines, and the failures that the environment asks for.

EMULATOR_FILE gets a line of JSON for each call. EMULATOR_FAILURE is empty or one of "import", "refuse" (every call),
"once" (the first call of log_batch with metrics), "hang" (log_batch), "exit" (log_batch ends the process).
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

FILE, FAILURE = Path(os.environ["EMULATOR_FILE"]), os.environ.get("EMULATOR_FAILURE", "")
if FAILURE == "import":
    raise ImportError("libemulator.so.1: cannot open shared object file")


def calls() -> list:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def note(name: str, *values: object) -> None:
    if FAILURE == "refuse":
        raise ConnectionError("the emulator refuses\nall connections")
    with FILE.open("a") as file:
        file.write(json.dumps([name, *values]) + "\n")


def get_tracking_uri() -> str:
    return "https://somebody:secret@emulator/"


class MlflowClient:
    def get_experiment_by_name(self, name: str) -> None:
        note("experiment", name)

    def create_experiment(self, name: str) -> str:
        return "1"

    def search_runs(self, experiments: list, query: str, max_results: int) -> list:
        made = [run for run in calls() if run[0] == "create" and run[1]["gpt2_bundle.run"] in query]
        parameters = {key: 0 for call in calls() if call[0] == "parameters" for key, _ in call[1]}
        return [SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(params=parameters))] * len(made)

    def create_run(self, experiment: str, run_name: str, tags: dict) -> SimpleNamespace:
        note("create", tags, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(params={}))

    def update_run(self, run: str, status: str) -> None:
        note("update", status)

    def log_batch(self, run: str, metrics: tuple = (), params: tuple = ()) -> None:
        if params:
            note("parameters", [each[:2] for each in params])
            return
        failed = Path(f"{FILE}.failed")
        if FAILURE == "once" and not failed.exists():
            failed.touch()
            raise TimeoutError("the emulator is away")
        if FAILURE == "hang":
            time.sleep(600)
        if FAILURE == "exit":
            print("the emulator gives up", flush=True)
            os._exit(3)
        note("metrics", [[key, value, step] for key, value, _, step in metrics])

    def set_tag(self, run: str, key: str, value: str) -> None:
        note("tag", key, value)

    def log_artifact(self, run: str, path: str, place: str) -> None:
        note("artifact", Path(path).name, place)

    def log_artifacts(self, run: str, path: str, place: str) -> None:
        note("artifacts", path, place)

    def set_terminated(self, run: str, status: str) -> None:
        note("end", status)
