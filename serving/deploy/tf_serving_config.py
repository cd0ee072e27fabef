"""The text files that configure TensorFlow Serving for a bundle's SavedModel. Standard library only.

Messages and fields are those of tensorflow/serving: ModelServerConfig (config/model_server_config.proto),
MonitoringConfig (config/monitoring_config.proto) and BatchingParameters
(servables/tensorflow/session_bundle_config.proto).
"""

from __future__ import annotations

# Sizes that a merged batch is filled up to, and that the warm-up runs. The last one is the largest batch.
BATCH_SIZES = (1, 2, 4, 8, 16)
# Batches that may wait; beyond them the server answers UNAVAILABLE at once, which a client may try again.
ENQUEUED_BATCHES = 32

MODELS = "models.config"
BATCHING = "batching_parameters.txt"
MONITORING = "monitoring.config"


def config_files(name: str) -> dict[str, str]:
    """File name to text, for the model `name` below /models, where the official container expects it."""
    return {
        MODELS: models_config(name, f"/models/{name}"),
        BATCHING: batching_parameters(),
        MONITORING: monitoring_config(),
    }


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
    """Requests are merged as they queue, none waits for company; the number of threads is left to the server's cores.

    Prompts of different widths may be merged, since the model takes positions and masks from the rows' lengths.
    """
    sizes = "".join(f"allowed_batch_sizes: {size}\n" for size in BATCH_SIZES)
    return f"""max_batch_size {{ value: {BATCH_SIZES[-1]} }}
batch_timeout_micros {{ value: 0 }}
max_enqueued_batches {{ value: {ENQUEUED_BATCHES} }}
pad_variable_length_inputs: true
{sizes}"""


def monitoring_config() -> str:
    """Metrics in Prometheus's format, on the REST port."""
    return """prometheus_config {
  enable: true
  path: "/monitoring/prometheus/metrics"
}
"""
