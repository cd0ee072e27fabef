"""The files and flags that configure TensorFlow Serving for a bundle's SavedModel. Standard library only.

Messages and fields are those of tensorflow/serving: ModelServerConfig (config/model_server_config.proto),
MonitoringConfig (config/monitoring_config.proto) and BatchingParameters
(servables/tensorflow/session_bundle_config.proto). Flags are those of model_servers/main.cc.
"""

from __future__ import annotations

from dataclasses import dataclass

# Sizes that the warm-up runs, and that the server fills a merged batch up to. The last one is the largest batch.
BATCH_SIZES = (1, 2, 4, 8, 16)
# Batches that may wait; beyond them the server answers UNAVAILABLE at once, which a client may try again.
ENQUEUED_BATCHES = 32
# The server's own default of 4 a core lets eight long answers on two cores hold status and metrics up.
THREADS = 64
POLL_SECONDS = 60

MODELS = "models.config"
BATCHING = "batching_parameters.txt"
MONITORING = "monitoring.config"
# What batching by the server does whatever the model is; the file and lint say the same.
BATCHING_RISKS = (
    "a request of zero rows never ends and holds a server thread",
    "one request that the model refuses fails all requests merged with it",
    "a request of another rank or type fails the requests merged with it",
)
PADDING_RISK = "with pad_variable_length_inputs, one request of a wrong rank ends the server process"


@dataclass(frozen=True)
class ServerOptions:
    """How the server is started.

    `rest_timeout` is seconds until the server ends a REST request, `threads` how many requests it works on at once by
    REST and by gRPC, each. `batching` has the server merge requests, at the risks in BATCHING_RISKS. Matrices stored in
    `matmul_parts` parts are multiplied by so many threads, an op a thread; else threads are left to the server.
    """

    rest_timeout: float = 30.0
    threads: int = THREADS
    batching: bool = False
    matmul_parts: int = 1

    def flags(self, config: str) -> list[str]:
        """Flags that container and binary have in common; `config` is the folder of the files there."""
        batching = ["--enable_batching=true", f"--batching_parameters_file={config}/{BATCHING}"]
        session = ["--tensorflow_intra_op_parallelism=1", f"--tensorflow_inter_op_parallelism={self.matmul_parts}"]
        return [
            *(batching if self.batching else []),
            f"--monitoring_config_file={config}/{MONITORING}",
            f"--file_system_poll_wait_seconds={POLL_SECONDS}",
            f"--rest_api_timeout_in_ms={int(self.rest_timeout * 1000)}",
            f"--rest_api_num_threads={self.threads}",
            f"--grpc_max_threads={self.threads}",
            *(session if self.matmul_parts > 1 else []),
        ]


def config_files(name: str, *, batching: bool = False) -> dict[str, str]:
    """File name to text, for the model `name` below /models, where the official container expects it."""
    files = {MODELS: models_config(name, f"/models/{name}"), MONITORING: monitoring_config()}
    return files | ({BATCHING: batching_parameters()} if batching else {})


def models_config(name: str, base_path: str) -> str:
    """One model, its newest version; `base_path` must be absolute, or the server refuses it."""
    return f"""model_config_list {{
  config {{
    name: "{name}"
    base_path: "{base_path}"
    model_platform: "tensorflow"
    model_version_policy {{ latest {{ num_versions: 1 }} }}
  }}
}}
"""


def batching_parameters() -> str:
    """Requests of one width are merged as they queue; the number of threads is left to the server's cores.

    Widths are not padded to one: a merged request of another rank then ends the server.
    """
    sizes = "".join(f"allowed_batch_sizes: {size}\n" for size in BATCH_SIZES)
    risks = "".join(f"#   - {risk};\n" for risk in BATCHING_RISKS)
    return f"""# Batching by the server. TensorFlow Serving itself has these faults with any model:
{risks}# Leave batching off where callers do not trust each other. Never set pad_variable_length_inputs:
# one request of a wrong rank then ends the server process.
max_batch_size {{ value: {BATCH_SIZES[-1]} }}
batch_timeout_micros {{ value: 0 }}
max_enqueued_batches {{ value: {ENQUEUED_BATCHES} }}
{sizes}"""


def monitoring_config() -> str:
    """Metrics in Prometheus's format, on the REST port."""
    return """prometheus_config {
  enable: true
  path: "/monitoring/prometheus/metrics"
}
"""
