"""Asks a server by a framework and prints its answers: python app_clients.py CLIENT URL MODEL."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

PROMPT, TOKENS, SEEDS, TOO_MANY = "ab cd", 96, (7, 7, 8), 100_000


def by_llm(url: str, model: str) -> object:
    with tempfile.TemporaryDirectory() as home:
        entries = [
            {"model_id": "own-completion", "model_name": model, "api_base": url, "completion": True},
            {"model_id": "own-chat", "model_name": model, "api_base": url},
        ]
        Path(home, "extra-openai-models.yaml").write_text(json.dumps(entries))  # JSON is YAML.
        os.environ.update(LLM_USER_PATH=home, OPENAI_API_KEY="none")
        import llm
        import openai

        def ask(kind: str, stream: bool = False, **options: Any) -> Any:
            chosen = llm.get_model(f"own-{kind}")
            return chosen.prompt(PROMPT, stream=stream, **{"max_tokens": TOKENS, "temperature": 0, **options})

        answers = {}
        for kind in ("completion", "chat"):
            whole, streamed = ask(kind), list(ask(kind, stream=True))
            text = whole.text()
            try:
                ask(kind, max_tokens=TOO_MANY).text()
                error = None
            except openai.BadRequestError as raised:
                error = raised.code
            usage = (whole.response_json or {})["usage"]
            answers[kind] = {
                "whole": text,
                "streamed": "".join(streamed),
                "chunks": len(streamed),
                "usage": [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]],
                "stopped": ask(kind, stop=text[2]).text(),
                "seeds": [ask(kind, temperature=1, seed=seed).text() for seed in SEEDS],
                "overflow": error,
            }
        return answers


def by_llama_index(url: str, model: str) -> object:
    import openai
    from llama_index.llms.openai_like import OpenAILike

    def client(chat: bool, **settings: Any) -> Any:
        own = {"max_tokens": TOKENS, "temperature": 0, "max_retries": 0, "context_window": 8192, **settings}
        return OpenAILike(model=model, api_base=url, api_key="none", is_chat_model=chat, **own)

    async def streamed_async(chat: bool) -> str:
        return "".join([each.delta or "" async for each in await client(chat).astream_complete(PROMPT)])

    answers = {}
    for kind, chat in (("completion", False), ("chat", True)):
        whole = client(chat).complete(PROMPT)
        streamed = [each.delta or "" for each in client(chat).stream_complete(PROMPT)]
        assert asyncio.run(streamed_async(chat)) == "".join(streamed)
        try:
            client(chat, max_tokens=TOO_MANY).complete(PROMPT)
            error = None
        except openai.BadRequestError as raised:
            error = raised.code
        usage = whole.additional_kwargs
        seeded = client(chat, temperature=1)
        stopping = client(chat, additional_kwargs={"stop": [whole.text[2]]})
        answers[kind] = {
            "whole": whole.text,
            "streamed": "".join(streamed),
            "chunks": len(streamed),
            "usage": [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]],
            "stopped": stopping.complete(PROMPT).text,
            "seeds": [seeded.complete(PROMPT, seed=seed).text for seed in SEEDS],
            "overflow": error,
        }
    return answers


def by_dspy(url: str, model: str) -> object:
    import dspy
    from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider

    # DSPy sends a schema only to a provider that is said to follow one.
    access = AccessPolicy(provider="own", base_url=url)
    definition = ProviderDefinition.chat(access, compat=OpenAIChatCompat(), placeholder_key="none")
    register_provider(definition, supports=ModelSupport(response_schema=True))
    names = {"text": f"text-completion-openai/{model}", "chat": f"openai/{model}", "own": f"own/{model}"}

    def client(kind: str, **settings: Any) -> Any:
        own = {"max_tokens": TOKENS, "temperature": 0, "num_retries": 0, "cache": False, **settings}
        model_type = "text" if kind == "text" else "chat"
        return dspy.LM(names[kind], api_base=url, api_key="none", model_type=model_type, **own)

    answers: dict[str, Any] = {}
    for kind in ("text", "chat"):
        lm = client(kind)
        (whole,) = lm(PROMPT)
        usage = lm.history[-1]["usage"]
        try:
            client(kind, max_tokens=TOO_MANY)(PROMPT)
            error = None
        except dspy.ContextWindowExceededError:
            error = "context_length_exceeded"
        stop = whole[2]
        answers["completion" if kind == "text" else "chat"] = {
            "whole": whole,
            "usage": [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]],
            "stopped": client(kind, stop=[stop])(PROMPT)[0],
            "seeds": [client(kind, temperature=1.0, seed=seed)(PROMPT)[0] for seed in SEEDS],
            "overflow": error,
        }
    answers["n"] = client("text", n=3, temperature=1.0, seed=7)(PROMPT)

    class Verdict(dspy.Signature):
        """Classify."""

        text: str = dspy.InputField()
        label: Literal["good", "bad"] = dspy.OutputField()
        sure: bool = dspy.OutputField()

    with dspy.context(lm=client("own", max_tokens=200), adapter=dspy.JSONAdapter()):
        found = dspy.Predict(Verdict)(text=PROMPT)
    answers["structured"] = [found.label, found.sure]
    return answers


if __name__ == "__main__":
    print(json.dumps(globals()[f"by_{sys.argv[1]}"](f"{sys.argv[2]}/v1", sys.argv[3])))
