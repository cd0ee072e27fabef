"""Asks a server by ovmsclient, over REST and gRPC, and prints its answers: python ovms_client.py URL GRPC MODEL."""

from __future__ import annotations

import json
import sys

import numpy as np
import ovmsclient

if __name__ == "__main__":
    url, address, model = sys.argv[1:]
    inputs = {
        "token_ids": np.array([[1, 2, 3], [4, 5, 256]], np.int32),
        "lengths": np.array([3, 2], np.int32),
        "max_new_tokens": np.array([6, 6], np.int32),
        "temperature": np.zeros(2, np.float32),
        "top_k": np.zeros(2, np.int32),
        "top_p": np.ones(2, np.float32),
        "seed": np.zeros(2, np.int64),
    }
    found = []
    for client in (
        ovmsclient.make_http_client(url.removeprefix("http://")),
        ovmsclient.make_grpc_client(address),
    ):
        (status,) = client.get_model_status(model_name=model).values()
        metadata = client.get_model_metadata(model_name=model)
        # By REST it hands TensorFlow Serving's own answer through.
        if "metadata" in metadata:
            metadata = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
        outputs = client.predict(inputs=inputs, model_name=model)
        rows = zip(outputs["token_ids"], outputs["lengths"], strict=True)
        tokens = [row[:length].tolist() for row, length in rows]
        found.append([status["state"], sorted(metadata["inputs"]), tokens])
    print(json.dumps(found))
