"""Continue texts greedily with plain ONNX Runtime on the portable graph, whose KV cache grows by concatenation.

A bundle's folder, texts and a number in, JSON out. Needs onnxruntime, numpy and tokenizers.
"""

import json
import sys

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

folder, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = ort.InferenceSession(f"{folder}/onnx/model.onnx", providers=["CPUExecutionProvider"])
config = json.loads(open(f"{folder}/config.json", encoding="utf-8").read())  # noqa: PTH123, SIM115
shape = (1, config["n_head"], 0, config["n_embd"] // config["n_head"])
outputs = [value.name for value in session.get_outputs()]


def greedy(prompt):
    cache = {value.name: np.zeros(shape, np.float32) for value in session.get_inputs() if "past" in value.name}
    ids, length, made = prompt, 0, []
    while len(made) < new_tokens:
        positions = np.arange(length, length + len(ids))
        length += len(ids)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64), **cache}
        found = dict(zip(outputs, session.run(outputs, feeds | {"position_ids": positions[None]}), strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        ids = [int(found["logits"][0, -1].argmax())]
        made += ids
    return made


prompts = [tokenizer.encode(text).ids for text in texts]
print(json.dumps({"tokens": prompts, "answers": [greedy(prompt) for prompt in prompts]}))
