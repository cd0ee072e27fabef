"""Print what MLflow's own client finds in a store, a line of JSON a run."""

from __future__ import annotations

import json
import sys

from mlflow import MlflowClient

client = MlflowClient(sys.argv[1])
for run in client.search_runs([client.get_experiment_by_name(sys.argv[2]).experiment_id]):
    names = run.data.metrics
    found = {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "parameters": run.data.params,
        "tags": run.data.tags,
        "metrics": {
            name: [[each.step, each.value] for each in client.get_metric_history(run.info.run_id, name)]
            for name in names
        },
        "artifacts": sorted(each.path for each in client.list_artifacts(run.info.run_id, "bundle")),
    }
    print(json.dumps(found))
