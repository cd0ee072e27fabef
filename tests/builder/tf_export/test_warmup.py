"""The records that warm TensorFlow Serving up, and the files that configure it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from builder.keras_backend import tf
from builder.recipe import ExportRecipe
from builder.tf_export.session_servable import SessionServable
from builder.tf_export.warmup import WARMUP, write_warmup
from serving.bundle import open_bundle
from serving.deploy.tf_serving_config import BATCH_SIZES, BATCHING_RISKS, config_files
from tests.tf_serving_protos import message
from tests.tiny_build import TinyBuild


def read(version: Path) -> list[PredictionLog]:
    records = tf.data.TFRecordDataset(str(version / WARMUP)).as_numpy_iterator()
    return [PredictionLog.FromString(record) for record in records]


@pytest.mark.slow
def test_every_record_of_a_build_runs_as_the_server_would_run_it(built: TinyBuild) -> None:
    version = built.bundle / "savedmodel" / "1"
    servable = SessionServable(version)
    ran: Counter[tuple[str, int]] = Counter()
    for log in read(version):
        assert log.WhichOneof("log_type") == "predict_log"
        request = log.predict_log.request
        assert request.model_spec.name == "tiny"
        signature = request.model_spec.signature_name
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        outputs = servable.run(signature, **inputs)
        rows = {len(value) for value in (*inputs.values(), *outputs.values())}
        assert len(rows) == 1
        ran[signature, rows.pop()] += 1
    assert "generate_text" in servable.signatures
    signatures = [name for name in servable.signatures if not name.startswith("__")]
    assert ran == Counter((name, size) for name in signatures for size in BATCH_SIZES)
    assert 0 < ran.total() <= 1000
    # All slots are free afterwards: as many prompts as there are slots find one.
    prompts = [[1]] * ExportRecipe().slots
    assert len(servable.generate_by_slots(prompts, max_new_tokens=2)) == len(prompts)
    request = {name: tf.make_ndarray(value) for name, value in log_of(version, "prefill_slots").inputs.items()}
    assert (servable.run("prefill_slots", **request)["status"] >= 0).any()


def log_of(version: Path, signature: str) -> Any:
    """The last request of a signature, which has the most rows."""
    requests = [log.predict_log.request for log in read(version)]
    return [request for request in requests if request.model_spec.signature_name == signature][-1]


def test_the_records_are_in_the_manifest_and_the_same_each_time(built: TinyBuild, tmp_path: Path) -> None:
    bundle = open_bundle(built.bundle)
    records = bundle.path(f"savedmodel/1/{WARMUP}").read_bytes()
    signatures = [graph.signature or "" for graph in bundle.manifest.graphs.values()]
    write_warmup(tmp_path, "tiny", bundle.manifest.model, signatures)
    assert (tmp_path / WARMUP).read_bytes() == records


def test_only_signatures_that_are_there_are_warmed_up(built: TinyBuild, tmp_path: Path) -> None:
    geometry = open_bundle(built.bundle, check="sizes").manifest.model
    assert write_warmup(tmp_path, "tiny", geometry, ["score", "another"]) == len(BATCH_SIZES)
    assert {log.predict_log.request.model_spec.signature_name for log in read(tmp_path)} == {"score"}


def test_the_bundle_has_the_servers_files_and_the_protos_parse_them(built: TinyBuild) -> None:
    bundle = open_bundle(built.bundle)
    texts = {name: bundle.path(f"deploy/tf_serving/{name}").read_text() for name in config_files("tiny")}
    assert texts == config_files("tiny") and "batching_parameters.txt" not in texts

    models = text_format.Parse(texts["models.config"], ModelServerConfig()).model_config_list.config
    assert [(model.name, model.base_path, model.model_platform) for model in models] == [
        ("tiny", "/models/tiny", "tensorflow")
    ]
    assert models[0].model_version_policy.latest.num_versions == 1

    monitoring = text_format.Parse(texts["monitoring.config"], message("MonitoringConfig"))
    assert monitoring.prometheus_config.enable and monitoring.prometheus_config.path.startswith("/")


def test_the_batching_that_one_may_ask_for_pads_nothing() -> None:
    text = config_files("tiny", batching=True)["batching_parameters.txt"]
    assert all(risk in text for risk in BATCHING_RISKS)
    batching = text_format.Parse(text, message("BatchingParameters"))
    # What the server asks of the sizes: increasing, and the last one is the largest batch.
    sizes = list(batching.allowed_batch_sizes)
    assert sizes == sorted(set(sizes)) and sizes[-1] == batching.max_batch_size.value
    assert not batching.pad_variable_length_inputs and batching.max_enqueued_batches.value > 0


def test_a_field_that_the_server_does_not_know_is_refused() -> None:
    with pytest.raises(text_format.ParseError):
        text_format.Parse("max_batch { value: 1 }", message("BatchingParameters"))
