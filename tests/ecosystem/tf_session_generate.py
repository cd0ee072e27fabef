"""Continue texts greedily by a SavedModel loaded as TensorFlow Serving loads one: into a session, by the tag "serve".

The folder of the SavedModel, texts and a number in, JSON out. Needs TensorFlow alone.
"""

import json
import sys

import numpy as np
import tensorflow as tf

folder, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
session = tf.compat.v1.Session(graph=tf.Graph())
signatures = tf.compat.v1.saved_model.load(session, ["serve"], folder).signature_def


def run(name, **inputs):
    signature = signatures[name]
    feeds = {signature.inputs[key].name: value for key, value in inputs.items()}
    return session.run({key: tensor.name for key, tensor in signature.outputs.items()}, feeds)


rows = len(texts)
tokens = run("tokenize", text=np.array([text.encode() for text in texts], object))
found = run(
    "serving_default",
    token_ids=tokens["token_ids"],
    lengths=tokens["lengths"],
    max_new_tokens=np.full(rows, new_tokens, np.int32),
    temperature=np.zeros(rows, np.float32),
    top_k=np.zeros(rows, np.int32),
    top_p=np.ones(rows, np.float32),
    seed=np.zeros(rows, np.int64),
)
cut = [
    [row[:length].tolist() for row, length in zip(table["token_ids"], table["lengths"], strict=True)]
    for table in (tokens, found)
]
print(json.dumps({"tokens": cut[0], "answers": cut[1]}))
