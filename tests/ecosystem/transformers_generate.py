"""Continue texts greedily with transformers' torch class: a bundle's folder, texts and a number in, JSON out."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompts = [tokenizer(text)["input_ids"] for text in texts]
answers = [
    model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)[0, len(prompt) :].tolist()
    for prompt in prompts
]
print(json.dumps({"tokens": prompts, "answers": answers}))
