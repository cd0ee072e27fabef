"""Continue prompts greedily with KerasHub's GPT2CausalLM, opened from a bundle's folder.

A bundle's folder and JSON in, JSON out. Runs in KerasHub's own environment.
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras_hub
import numpy as np

folder, text, prompts, new_tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
model = keras_hub.models.GPT2CausalLM.from_preset(folder, dtype="float32")
model.compile(sampler="greedy", jit_compile=False)
generate = model.make_generate_function()
continued = []
for prompt in prompts:
    width = len(prompt) + new_tokens
    ids = np.zeros((1, width), np.int32)
    ids[0, : len(prompt)] = prompt
    mask = np.arange(width)[None] < len(prompt)
    made = generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)["token_ids"]
    continued.append(np.asarray(made)[0, len(prompt) :].tolist())
print(json.dumps({"tokens": np.asarray(model.preprocessor.tokenizer(text)).tolist(), "continued": continued}))
