// Asks a server by the AI SDK and prints its answers: node ai_sdk_client.mjs MODULES URL MODEL.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, url, name] = process.argv.slice(2);
const resolve = createRequire(`${modules}/`).resolve;
const load = (library) => import(pathToFileURL(resolve(library)));
const { APICallError, generateObject, generateText, jsonSchema, streamText } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
globalThis.AI_SDK_LOG_WARNINGS = false;

const provider = createOpenAICompatible({
  name: "own", baseURL: `${url}/v1`, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const counts = (usage) => [usage.inputTokens, usage.outputTokens, usage.totalTokens];

async function answers(model) {
  const base = { model, prompt: "ab cd", maxOutputTokens: 96, temperature: 0, maxRetries: 0 };
  const whole = await generateText(base);
  const stream = streamText(base);
  const chunks = [];
  for await (const piece of stream.textStream) chunks.push(piece);
  const stopped = await generateText({ ...base, stopSequences: [whole.text[2]] });
  const seeds = [];
  for (const seed of [7, 7, 8]) seeds.push((await generateText({ ...base, temperature: 1, seed })).text);
  let overflow = null;
  try {
    await generateText({ ...base, maxOutputTokens: 100000 });
  } catch (error) {
    if (APICallError.isInstance(error) && error.statusCode === 400 && !error.isRetryable) overflow = error.data.error.code;
  }
  const errors = [];
  const failing = streamText({ ...base, maxOutputTokens: 100000, onError: ({ error }) => errors.push(error.data.error.code) });
  for await (const piece of failing.textStream) errors.push(piece);
  // An aborted stream must not keep the next request from its answer.
  const leaving = new AbortController();
  let pieces = 0;
  for await (const _ of streamText({ ...base, maxOutputTokens: 8000, abortSignal: leaving.signal }).textStream) {
    if (++pieces === 3) leaving.abort();
  }
  const after = await generateText(base);
  return {
    whole: whole.text, streamed: chunks.join(""), chunks: chunks.length, usage: counts(whole.usage),
    streamed_usage: counts(await stream.usage), finish: [whole.finishReason, await stream.finishReason, stopped.finishReason],
    stopped: stopped.text, seeds, overflow, streamed_overflow: errors, aborted: pieces < 4000, after: after.text,
  };
}

const chat = provider.chatModel(name);
const schema = jsonSchema({
  type: "object", properties: { ok: { type: "boolean" }, kind: { enum: ["a", "b"] } }, required: ["ok", "kind"],
  additionalProperties: false,
});
const { object } = await generateObject({ model: chat, prompt: "x", schema, temperature: 0, maxOutputTokens: 200, maxRetries: 0 });
console.log(JSON.stringify({
  completion: await answers(provider.completionModel(name)), chat: await answers(chat), structured: object,
}));
