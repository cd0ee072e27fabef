"""Continue texts greedily, as one left-padded batch, with Optimum's ONNX Runtime class.

A bundle's folder, texts and a number in, JSON out. Runs in Optimum's own environment.
"""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
batch = tokenizer(texts, return_tensors="pt", padding=True)
made = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
answers = made[:, batch["input_ids"].shape[1] :].tolist()
print(json.dumps({"tokens": tokenizer(texts)["input_ids"], "answers": answers, "uses_cache": model.use_cache}))
