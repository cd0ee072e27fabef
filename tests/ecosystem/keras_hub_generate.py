"""Continue texts greedily with KerasHub's GPT2CausalLM, opened from a bundle's folder.

A bundle's folder, texts and a number in, JSON out. Runs in KerasHub's own environment.
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras_hub
import numpy as np

folder, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = keras_hub.models.GPT2CausalLM.from_preset(folder, dtype="float32")
model.compile(sampler="greedy", jit_compile=False)
prompts = [np.asarray(model.preprocessor.tokenizer(text)).tolist() for text in texts]
generate = model.make_generate_function()
answers = []
for prompt in prompts:
    width = len(prompt) + new_tokens
    ids = np.zeros((1, width), np.int32)
    ids[0, : len(prompt)] = prompt
    mask = np.arange(width)[None] < len(prompt)
    made = generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)["token_ids"]
    answers.append(np.asarray(made)[0, len(prompt) :].tolist())
print(json.dumps({"tokens": prompts, "answers": answers}))
