"""Messages that TensorFlow Serving reads its text files as, but that tensorflow-serving-api does not ship.

Only what the official .proto files say of names, numbers and types: BatchingParameters of
servables/tensorflow/session_bundle_config.proto and MonitoringConfig of config/monitoring_config.proto.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

_Field = descriptor_pb2.FieldDescriptorProto
_INT64 = ".google.protobuf.Int64Value"
_FIELDS: dict[str, list[tuple[str, int, Any, int, str]]] = {
    "BatchingParameters": [
        ("max_batch_size", 1, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, _INT64),
        ("batch_timeout_micros", 2, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, _INT64),
        ("max_enqueued_batches", 3, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, _INT64),
        ("num_batch_threads", 4, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, _INT64),
        ("thread_pool_name", 5, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, ".google.protobuf.StringValue"),
        ("allowed_batch_sizes", 6, _Field.TYPE_INT64, _Field.LABEL_REPEATED, ""),
        ("pad_variable_length_inputs", 7, _Field.TYPE_BOOL, _Field.LABEL_OPTIONAL, ""),
    ],
    "PrometheusConfig": [
        ("enable", 1, _Field.TYPE_BOOL, _Field.LABEL_OPTIONAL, ""),
        ("path", 2, _Field.TYPE_STRING, _Field.LABEL_OPTIONAL, ""),
    ],
    "MonitoringConfig": [
        ("prometheus_config", 1, _Field.TYPE_MESSAGE, _Field.LABEL_OPTIONAL, ".restated.PrometheusConfig"),
    ],
}


def message(name: str) -> Any:
    """An empty message "BatchingParameters" or "MonitoringConfig"."""
    file = descriptor_pb2.FileDescriptorProto(
        name="restated.proto", package="restated", syntax="proto3", dependency=[wrappers_pb2.DESCRIPTOR.name]
    )
    for kind, fields in _FIELDS.items():
        added = file.message_type.add(name=kind)
        for field, number, type_, label, type_name in fields:
            added.field.add(name=field, number=number, type=type_, label=label, type_name=type_name or None)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"restated.{name}"))()
