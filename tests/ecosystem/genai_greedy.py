"""Continue prompts greedily in ONNX Runtime GenAI: folder and JSON in, JSON out. Runs in GenAI's own environment."""

import json
import sys

import onnxruntime_genai as og

folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
answers = []
for prompt in prompts:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(token) for token in generator.get_sequence(0)][len(prompt) :])
text = "naïve 'quotes' and 東京\n\n    indented"
tokens = [int(token) for token in og.Tokenizer(model).encode(text)]
print(json.dumps({"answers": answers, "tokens": tokens, "text": text}))
