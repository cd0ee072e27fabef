"""Continue texts greedily in ONNX Runtime GenAI: a folder below ort/, texts and a number in, JSON out."""

import json
import sys

import onnxruntime_genai as og

folder, texts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
prompts = [[int(token) for token in tokenizer.encode(text)] for text in texts]
answers = []
for prompt in prompts:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(token) for token in generator.get_sequence(0)][len(prompt) :])
print(json.dumps({"tokens": prompts, "answers": answers}))
