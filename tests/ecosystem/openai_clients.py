"""Asks a server by one of OpenAI's clients and prints its answers: python openai_clients.py CLIENT URL MODEL."""

from __future__ import annotations

import json
import sys

PROMPT, TOKENS = "ab cd", 8


def by_openai(url: str, model: str) -> object:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True)
    assert client.models.retrieve(model).id == model
    try:
        client.completions.create(model=model, prompt=PROMPT, max_tokens=100_000)
    except openai.BadRequestError as error:
        return [whole.choices[0].text, "".join(each.choices[0].text for each in stream), error.code]
    return None


def by_litellm(url: str, model: str) -> object:
    import litellm

    arguments = {"model": f"text-completion-openai/{model}", "api_base": url, "api_key": "none", "temperature": 0}
    whole = litellm.text_completion(prompt=PROMPT, max_tokens=TOKENS, **arguments)
    stream = litellm.text_completion(prompt=PROMPT, max_tokens=TOKENS, stream=True, **arguments)
    try:
        litellm.text_completion(prompt=PROMPT, max_tokens=100_000, num_retries=0, **arguments)
    except litellm.ContextWindowExceededError:
        streamed = "".join(each.choices[0].text or "" for each in stream)
        return [whole.choices[0].text, streamed, "context_length_exceeded"]
    return None


def by_langchain(url: str, model: str) -> object:
    from langchain_openai import OpenAI

    llm = OpenAI(base_url=url, api_key="none", model=model, max_tokens=TOKENS, temperature=0, max_retries=0)
    return [llm.invoke(PROMPT), "".join(llm.stream(PROMPT)), "context_length_exceeded"]


if __name__ == "__main__":
    print(json.dumps(globals()[f"by_{sys.argv[1]}"](f"{sys.argv[2]}/v1", sys.argv[3])))
