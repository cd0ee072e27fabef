"""Warm-up records: requests that TensorFlow Serving runs when it loads a version, before the first client comes.

The file is a TFRecord of PredictionLog messages (tensorflow/serving, apis/prediction_log.proto), of which the server
reads at most 1000: one request for each signature and each batch size that batching allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from builder.keras_backend import tf
from serving.bundle import Geometry
from serving.deploy.tf_serving_config import BATCH_SIZES

WARMUP = "assets.extra/tf_serving_warmup_requests"
# Two columns, so that both a row that fills them and one that is padded are run; and two new tokens, so that the loop's
# body is. The file stays small: a request of `decode` carries its cache.
_WIDTH = 2
_NEW_TOKENS = 2


def write_warmup(version: Path, name: str, geometry: Geometry, signatures: Sequence[str]) -> int:
    """Write the records of those `signatures` that have requests below the version folder; return how many.

    `name` is the model's. The records of the slots' signatures are rehearsals, which leave no state.
    """
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    path = version / WARMUP
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in warmup_requests(geometry):
            if signature not in signatures:
                continue
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.name, request.model_spec.signature_name = name, signature
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            # In order of keys, so that equal exports have equal hashes.
            writer.write(log.SerializeToString(deterministic=True))
            count += 1
    return count


def warmup_requests(geometry: Geometry) -> Iterator[tuple[str, dict[str, Any]]]:
    """Signature and inputs, arrays by name, for each of BATCH_SIZES; all rows are within the model's bounds."""
    width = min(_WIDTH, geometry.n_positions)
    for rows in BATCH_SIZES:
        prompt = {
            "token_ids": np.full([rows, width], geometry.eos_token_id, np.int32),
            "lengths": (1 + np.arange(rows) % width).astype(np.int32),
        }
        parameters = {
            "max_new_tokens": np.full(rows, _NEW_TOKENS, np.int32),
            "temperature": np.full(rows, 0.8, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "top_p": np.full(rows, 0.9, np.float32),
            "seed": np.arange(rows, dtype=np.int64),
        }
        text = {"text": np.full(rows, b"Return the", np.object_)}
        cache = np.zeros([rows, geometry.n_head, width, geometry.head_dim], np.float32)
        names = [f"cache_{layer}_{part}" for layer in range(geometry.n_layer) for part in ("key", "value")]
        step = {"token_ids": prompt["token_ids"][:, 0], "lengths": np.full(rows, width - 1, np.int32)}
        held = {"slot": np.zeros(rows, np.int32), "generation": np.full(rows, -1, np.int64)}
        steps = {"received": np.zeros(rows, np.int32), "steps": np.ones(rows, np.int32)}
        yield "serving_default", prompt | parameters
        yield "prefill", prompt | {"capacity": np.full(rows, width, np.int32)}
        yield "decode", step | dict.fromkeys(names, cache)
        yield "score", prompt
        yield "generate_text", text | parameters
        yield "tokenize", text
        yield "detokenize", prompt
        yield "prefill_slots", {"request_id": -1 - np.arange(rows, dtype=np.int64)} | prompt | parameters
        yield "decode_slots", held | steps
        yield "release_slots", held
        yield "cancel_slots", {"request_id": np.full(rows, -(2**62), np.int64)}
