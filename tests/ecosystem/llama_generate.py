"""Continue texts greedily with llama.cpp: a GGUF file, texts and a number in, JSON out. Needs llama-cpp-python."""

import json
import sys

from llama_cpp import GGML_TYPE_F32, Llama

path, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llama = Llama(path, n_ctx=0, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
prompts = [llama.tokenize(text.encode()) for text in texts]
answers = []
for prompt in prompts:
    stream = llama.generate(prompt, temp=0, repeat_penalty=1.0, reset=True)
    answers.append([token for token, _ in zip(stream, range(new_tokens), strict=False)])
back = [llama.detokenize(prompt).decode() for prompt in prompts]
about = {"eos": llama.token_eos(), "bos": llama.token_bos(), "name": llama.metadata["general.name"]}
print(json.dumps({"tokens": prompts, "answers": answers, "texts": back} | about))
