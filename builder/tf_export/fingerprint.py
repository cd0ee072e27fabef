"""A SavedModel's fingerprint.pb, made to depend on the SavedModel alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tensorflow.core.protobuf.fingerprint_pb2 import FingerprintDef

_UUID_BYTES = 16


def settle_fingerprint(version: Path) -> None:
    """Replace the random `uuid` of `version`/fingerprint.pb by a hash of the fingerprint's other fields.

    Two exports of one model then have equal bytes, and two models have other ids. TensorFlow reads the id as a decimal
    number of 128 bits.
    """
    path = version / "fingerprint.pb"
    fingerprint = FingerprintDef.FromString(path.read_bytes())
    fingerprint.uuid = ""
    digest = hashlib.sha256(fingerprint.SerializeToString(deterministic=True)).digest()
    fingerprint.uuid = str(int.from_bytes(digest[:_UUID_BYTES], "big"))
    path.write_bytes(fingerprint.SerializeToString(deterministic=True))
