"""Continue texts greedily with OpenVINO on an ONNX graph as it lies in a bundle, its KV cache passed back each step.

A bundle's folder, the graph's path in it, texts and a number in, JSON out. Needs openvino, numpy and tokenizers.
"""

import json
import sys

import numpy as np
import openvino
from tokenizers import Tokenizer

folder, graph, texts, new_tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
model = openvino.compile_model(f"{folder}/{graph}", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
config = json.loads(open(f"{folder}/config.json", encoding="utf-8").read())  # noqa: PTH123, SIM115
heads, width = config["n_head"], config["n_embd"] // config["n_head"]
pasts = [port.any_name for port in model.inputs if "past" in port.any_name]


def greedy(prompt):
    # ort/* reads and writes one buffer of the whole length; the portable graph's cache begins empty and grows.
    room = len(prompt) + new_tokens if graph.startswith("ort/") else 0
    cache = {name: np.zeros((1, heads, room, width), np.float32) for name in pasts}
    ids, length, made = prompt, 0, []
    while len(made) < new_tokens:
        positions = np.arange(length, length + len(ids))
        length += len(ids)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64), **cache}
        found = model(feeds | {"position_ids": positions[None]})
        cache = {name: found[name.replace("past_key_values", "present")] for name in pasts}
        ids = [int(found["logits"][0, -1].argmax())]
        made += ids
    return made


prompts = [tokenizer.encode(text).ids for text in texts]
print(json.dumps({"tokens": prompts, "answers": [greedy(prompt) for prompt in prompts]}))
