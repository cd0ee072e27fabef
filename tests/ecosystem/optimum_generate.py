"""Continue a left-padded batch greedily with Optimum's ONNX Runtime class and with transformers' torch class.

A bundle's folder and JSON in, JSON out. Runs in Optimum's own environment.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
settings = {"attention_mask": mask, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False,
            "pad_token_id": tokenizer.eos_token_id}  # fmt: skip
models = {
    "optimum": ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx"),
    "transformers": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
}
answers = {name: model.generate(ids, **settings)[:, width:].tolist() for name, model in models.items()}
print(json.dumps(answers | {"uses_cache": models["optimum"].use_cache}))
