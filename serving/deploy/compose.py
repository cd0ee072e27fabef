"""Docker Compose: the server in one container of this machine, with the bundle mounted from its folder."""

from __future__ import annotations

from typing import Any

from serving.deploy.endpoints import HTTP, KEYS_VARIABLE, PORTS, PROBES
from serving.deploy.workload import BUNDLES, USER, Workload


def compose_file(load: Workload, folder: str) -> dict[str, Any]:
    """The compose file; `folder` is the bundle's, relative to the file."""
    ready = next(probe for probe in PROBES if probe.kind == "readiness")
    url = f"http://127.0.0.1:{HTTP.number}{ready.path}"
    check = f"import urllib.request; urllib.request.urlopen({url!r}, timeout={ready.timeout})"
    service: dict[str, Any] = {
        "image": load.image,
        "command": load.arguments(),
        # Loopback only. Without keys in the environment, every program of this machine may ask.
        "ports": [f"127.0.0.1:{port.number}:{port.number}" for port in PORTS],
        "environment": {KEYS_VARIABLE: f"${{{KEYS_VARIABLE}:-}}", "TMPDIR": "/tmp"},
        "volumes": [{"type": "bind", "source": f"./{folder}", "target": f"{BUNDLES}/{load.model}", "read_only": True}],
        "user": f"{USER}:{USER}",
        "read_only": True,
        "tmpfs": [f"/tmp:size=256m,uid={USER},gid={USER}"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "cpus": load.options.cpus,
        "mem_limit": f"{load.memory_mib}m",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", check],
            "interval": f"{ready.period}s",
            "timeout": f"{ready.timeout + 2}s",
            "retries": ready.failures,
            "start_period": f"{load.startup_failures * ready.period}s",
        },
        "stop_grace_period": f"{load.grace_seconds}s",
        "restart": "unless-stopped",
    }
    if load.options.device == "cuda":
        gpu = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpu]}}}
    return {"services": {"server": service}}
