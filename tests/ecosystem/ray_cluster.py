"""A local Ray cluster of two nodes that serves a bundle, for tests that steer it by lines of JSON.

`ray_cluster.py PORT` starts a head node and a worker node, of one processor each, with their files in RAY_TMPDIR.
Then each line on standard input is an order, answered by one line: ["deploy", ARGS, DEPLOYMENTS] deploys as a Serve
configuration does; ["kill"] kills the worker node with all its processes; ["add"] starts one again; ["replicas"] lists
the running replicas. The end of the input ends the cluster.
"""

import json
import os
import sys
import time

# A node that is gone is noticed within about 3 seconds instead of 30, and load within 1 second instead of 10.
os.environ |= {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

MEBIBYTE = 1 << 20
SECONDS = 120


def deploy(port, args, deployments):
    """Deploy as `serve deploy` does. What keeps the application from running, "" if it runs."""
    client = serve_start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    application = {"name": "app", "import_path": "serving.ray.app:build", "args": args, "deployments": deployments}
    client.deploy_apps(ServeDeploySchema(applications=[application]))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        status = serve.status().applications["app"]
        if status.status == "RUNNING":
            return ""
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            break
        time.sleep(0.2)
    return f"{status.status}: {status.message} {[each.message for each in status.deployments.values()]}"


def replicas():
    details = serve_start().get_serve_details()
    deployment = details["applications"]["app"]["deployments"].get("Replica", {"replicas": []})
    return [each["node_id"] for each in deployment["replicas"] if each["state"] == "RUNNING"]


def main():
    port = int(sys.argv[1])
    # Ray prints what happens to its nodes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    node = {
        "num_cpus": 1,
        "object_store_memory": 80 * MEBIBYTE,
        "memory": 2048 * MEBIBYTE,
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args=node)
    worker = cluster.add_node(**node)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        print(json.dumps({"head": ray.get_runtime_context().get_node_id()}), file=answers, flush=True)
        for line in sys.stdin:
            order, *values = json.loads(line)
            answer = None
            if order == "deploy":
                answer = deploy(port, *values)
            elif order == "kill":
                cluster.remove_node(worker, allow_graceful=False)
            elif order == "add":
                worker = cluster.add_node(**node)
            elif order == "replicas":
                answer = replicas()
            print(json.dumps({order: answer}), file=answers, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
