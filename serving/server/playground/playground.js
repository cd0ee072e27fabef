"use strict";
// Everything from the server goes into the page as text nodes and attributes, never as markup.

const $ = (id) => document.getElementById(id);
const ALTERNATIVES = 5;
const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 1 },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, value: 1 },
  { name: "top_k", label: "Top-k (0 is off)", min: 0, max: 200, step: 1, value: 0 },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, value: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1 },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 512, step: 1, value: 128 },
];
let running = null; // The AbortController of the request under way.
let turns = null; // The messages of a chat so far; null where a text is completed.
let target; // What holds the tokens that come.
let decoder; // Characters that are split over tokens come together in the last of these.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function addSliders() {
  for (const field of FIELDS) {
    const input = element("input", { type: "range", id: field.name, min: field.min, max: field.max, step: field.step });
    const shown = element("output", { htmlFor: field.name });
    const show = () => (shown.textContent = input.value);
    input.value = field.value;
    input.addEventListener("input", show);
    show();
    $("sliders").append(element("div", { className: "slider" }, element("label", { htmlFor: field.name }, field.label), shown, input));
  }
}

function say(problem) {
  $("error").textContent = problem;
  $("error").hidden = !problem;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("locked").hidden = false;
    $("key").focus();
  }
  const body = await answer.json().catch(() => ({}));
  const retry = answer.headers.get("Retry-After");
  const sentence = (body.error?.message || `the server answered ${answer.status}`) + (retry ? ` (try again in ${retry} s)` : "");
  throw Object.assign(new Error(sentence), { param: body.error?.param });
}

async function loadModels() {
  const { data } = await (await ask("v1/models")).json();
  const before = $("model").value;
  $("model").replaceChildren(...data.map((card) => element("option", { value: card.id }, card.id)));
  if (data.some((card) => card.id === before)) $("model").value = before;
  const prompt = $("prompt");
  const chosen = data.find((card) => card.id === $("model").value);
  const knowsChat = Boolean(chosen?.example_message);
  $("modes").hidden = !knowsChat;
  const example = turns ? chosen?.example_message : chosen?.example_prompt;
  if (chosen && prompt.value === prompt.defaultValue) prompt.value = prompt.defaultValue = example;
  const longest = Math.max(...data.map((card) => card.max_model_len));
  if (Number.isFinite(longest)) $("max_tokens").max = longest - 1;
  $("max_tokens").dispatchEvent(new Event("input")); // Its value may have been above that.
  if (!data.length) throw new Error("no model is loaded yet; try again in a moment");
}

const post = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// The chat with its next message.
function messages() {
  const told = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  return [...told, ...turns, { role: "user", content: $("prompt").value }];
}

// The request, with as many tokens as the context has room for behind the prompt.
async function request(signal) {
  const model = $("model").value;
  const text = turns ? { messages: messages() } : { prompt: $("prompt").value };
  const scores = turns ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
  const body = { model, ...text, ...scores, stream: true, stream_options: { include_usage: true } };
  for (const field of FIELDS) body[field.name] = Number($(field.name).value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  const { count, max_model_len: context } = await (await ask("tokenize", { ...post({ model, ...text }), signal })).json();
  const room = context - Math.max(count, 1);
  if (room > 0) body.max_tokens = Math.min(body.max_tokens, room); // Else the server says what is wrong.
  return body;
}

// The data of each server-sent event, until [DONE].
async function* events(stream) {
  const text = new TextDecoder();
  const reader = stream.getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const parts = (left + text.decode(value, { stream: true })).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

// The text that a token adds; one that is part of a character has the form bytes:\xNN.
function textOf(token) {
  const pieces = token.startsWith("bytes:\\x") ? token.slice(6).match(/\\x[0-9a-f]{2}/g) : null;
  const bytes = pieces ? Uint8Array.from(pieces, (piece) => parseInt(piece.slice(2), 16)) : new TextEncoder().encode(token);
  return decoder.decode(bytes, { stream: true });
}

// A choice's tokens as [token, logprob, alternatives by token], of completions and of chat completions.
function tokensOf({ logprobs }) {
  if (logprobs?.content) {
    return logprobs.content.map((each) => [each.token, each.logprob, { [each.token]: each.logprob, ...Object.fromEntries(each.top_logprobs.map((other) => [other.token, other.logprob])) }]);
  }
  return (logprobs?.tokens ?? []).map((token, at) => [token, logprobs.token_logprobs[at], logprobs.top_logprobs[at]]);
}

function addTokens(tokens) {
  const output = $("output");
  const below = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  for (const [token, logprob, top] of tokens) {
    const span = element("span", {}, textOf(token));
    span.style.setProperty("--p", Math.exp(logprob).toFixed(4));
    span.alternatives = { token, top: Object.entries(top).sort((a, b) => b[1] - a[1]) };
    target.append(span);
  }
  if (below) output.scrollTop = output.scrollHeight;
}

function addText(text) {
  if (text) target.append(element("span", {}, text));
}

// Show the chat so far, and an empty place for the answer.
function showTurns(asked) {
  const shown = asked.map(({ role, content }) => {
    const turn = element("div", { className: "turn" }, content);
    turn.dataset.role = role;
    return turn;
  });
  target = element("div", { className: "turn" });
  target.dataset.role = "assistant";
  $("output").replaceChildren(...shown, target);
  $("output").scrollTop = $("output").scrollHeight;
}

function setMode(chat) {
  if (running || Boolean(turns) === chat) return;
  $("prompt").value ||= $("prompt").defaultValue;
  const untouched = $("prompt").value === $("prompt").defaultValue;
  turns = chat ? [] : null;
  for (const [id, on] of [["chat", chat], ["complete", !chat]]) $(id).setAttribute("aria-selected", on);
  $("told").hidden = $("fresh").hidden = !chat;
  $("asked").textContent = chat ? "Message" : "Prompt";
  $("generate").textContent = chat ? "Send" : "Generate";
  $("output").replaceChildren();
  delete $("output").dataset.prompt;
  say("");
  if (untouched) loadModels().catch((error) => say(error.message));
}

// The stream of completions; a runtime that knows no probabilities streams text alone.
async function complete(body, signal) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  try {
    return await ask(path, { ...post(body), signal });
  } catch (error) {
    if (error.param !== "logprobs") throw error;
    delete body.logprobs;
    delete body.top_logprobs;
    return await ask(path, { ...post(body), signal });
  }
}

async function generate() {
  if (running) return;
  running = new AbortController();
  $("generate").disabled = true;
  $("stop").disabled = false;
  say("");
  hideCard();
  decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let began = 0;
  let first = 0;
  let tokens = 0;
  const show = (ended) => {
    const seconds = (performance.now() - first) / 1000;
    $("first").textContent = first ? `${(first - began).toFixed(0)} ms` : "–";
    $("rate").textContent = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–";
    $("count").textContent = tokens;
    $("ended").textContent = ended;
  };
  show("…");
  try {
    if (!$("model").value) await loadModels();
    const { signal } = running;
    const body = await request(signal);
    if (body.messages) {
      showTurns(body.messages);
    } else {
      target = $("output");
      target.replaceChildren();
      target.dataset.prompt = body.prompt; // Shown by the style sheet, since it is not part of the text.
    }
    began = performance.now();
    const answer = await complete(body, signal);
    let reason = "…";
    let said = "";
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        const scored = tokensOf(choice);
        const text = choice.text ?? choice.delta.content ?? "";
        said += text;
        if (scored.length || text) first ||= performance.now();
        if (scored.length) addTokens(scored);
        else addText(text);
        tokens += scored.length || Number(text !== ""); // A piece without scores is a token or more; the usage says how many.
        reason = choice.finish_reason ?? reason;
      }
      tokens = event.usage?.completion_tokens ?? tokens;
      show(reason);
    }
    target.lastElementChild?.append(decoder.decode());
    if (body.messages) {
      turns.push(body.messages.at(-1), { role: "assistant", content: said });
      $("prompt").value = "";
      $("prompt").focus();
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("ended").textContent = stopped ? "you" : "error";
    if (!stopped) say(error.message);
  } finally {
    running = null;
    $("generate").disabled = false;
    $("stop").disabled = true;
  }
}

// Spaces and line ends of a token as marks, so that " a" and "a" differ on the card.
const visible = (token) => token.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");

function line(token, logprob, own) {
  const percent = Math.exp(logprob) * 100;
  const row = element("div", { className: own ? "own" : "" });
  row.append(element("b", {}, visible(token)), element("i", {}, `${percent < 0.1 ? "< 0.1" : percent.toFixed(1)} %`));
  row.style.setProperty("--p", (percent / 100).toFixed(4));
  return row;
}

function showCard(span) {
  const { token, top } = span.alternatives;
  $("output").querySelector(".chosen")?.classList.remove("chosen");
  span.classList.add("chosen");
  $("card").replaceChildren(...top.map(([other, logprob]) => line(other, logprob, other === token)));
  $("card").hidden = false;
  const box = [...span.getClientRects()].at(-1) ?? span.getBoundingClientRect();
  const card = $("card").getBoundingClientRect();
  const { clientWidth: width, clientHeight: height } = document.documentElement; // Without scroll bars.
  const above = box.bottom + 6 + card.height > height;
  $("card").style.left = `${Math.max(8, Math.min(box.left, width - card.width - 8))}px`;
  $("card").style.top = `${above ? Math.max(8, box.top - card.height - 6) : box.bottom + 6}px`;
}

function hideCard() {
  $("card").hidden = true;
  $("output").querySelector(".chosen")?.classList.remove("chosen");
}

function choose(event) {
  if (event.target.alternatives) showCard(event.target);
  else hideCard();
}

function step(event) {
  const way = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
  if (event.key === "Escape") hideCard();
  if (!way) return;
  const chosen = $("output").querySelector(".chosen");
  const next = chosen ? chosen[way] : target?.firstElementChild;
  if (next?.alternatives) {
    next.scrollIntoView({ block: "nearest" });
    showCard(next);
  }
  event.preventDefault();
}

addSliders();
$("settings").open = innerWidth > 760;
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
});
$("complete").addEventListener("click", () => setMode(false));
$("chat").addEventListener("click", () => setMode(true));
$("fresh").addEventListener("click", () => {
  if (running) return;
  turns = [];
  $("output").replaceChildren();
  $("prompt").focus();
});
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", () => loadModels().then(() => say(""), (error) => say(error.message)));
$("output").addEventListener("pointerover", choose);
$("output").addEventListener("click", choose);
$("output").addEventListener("pointerleave", hideCard);
$("output").addEventListener("keydown", step);
addEventListener("scroll", hideCard, { passive: true });
loadModels().catch((error) => say(error.message));
