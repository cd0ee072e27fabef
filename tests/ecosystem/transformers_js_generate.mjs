// Continue texts greedily with transformers.js. The same function runs on Node and in a page.

export async function answer(library, name, texts, newTokens) {
  const { AutoModelForCausalLM, AutoTokenizer } = library;
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name);
  const tokens = [], answers = [];
  for (const text of texts) {
    const prompt = await tokenizer(text);
    const ids = prompt.input_ids.tolist()[0].map(Number);
    const made = await model.generate({ ...prompt, max_new_tokens: newTokens, do_sample: false });
    tokens.push(ids);
    answers.push(made.tolist()[0].map(Number).slice(ids.length));
  }
  return { tokens, answers };
}

// node FILE LIBRARY FOLDER NAME TEXTS NEW_TOKENS
if (typeof process !== "undefined") {
  const [library, folder, name, texts, newTokens] = process.argv.slice(2);
  const transformers = await import(library);
  transformers.env.localModelPath = folder;
  transformers.env.allowRemoteModels = false;
  console.log(JSON.stringify(await answer(transformers, name, JSON.parse(texts), Number(newTokens))));
}
