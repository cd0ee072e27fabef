"""Fields of other servers' requests that change what an answer means and are not done here.

Leaving one out in silence would give an answer to another question, so it is refused by name, unless its value is one
that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.server.errors import FieldError

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "tools": (),
    "functions": (),
    # vLLM
    "use_beam_search": (),
    "length_penalty": (1,),
    "early_stopping": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "priority": (0,),
    "include_stop_str_in_output": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "guided_decoding_backend": ("guidance", "auto"),
    "guided_whitespace_pattern": (),
    "thinking_token_budget": (),
    # llama.cpp
    "n_predict": (),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "grammar": (),
    "json_schema": (),
    "samplers": (),
    "n_probs": (0,),
    # Hugging Face's names
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "do_sample": (),
    "stop_sequences": (),
    "truncate": (),
    "watermark": (),
}
"""With the values that change nothing, in addition to null, false and whatever is empty."""
STRUCTURED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""The same for what protocols refuse that do not have structured output."""
CHAT_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    # vLLM
    "chat_template": (),
    "documents": (),
    "echo": (),
    "prompt_logprobs": (),
    "best_of": (1,),
    # completions
    "prompt": (),
    "suffix": (),
}
"""The same for chat completions, in addition."""
_INSTEAD = {
    "grammar": "guided_grammar",
    "json_schema": "response_format",
    "guided_decoding_backend": "guidance",
    "prompt": "messages, or /v1/completions",
    "prompt_logprobs": "/v1/completions",
    "echo": "/v1/completions",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "do_sample": "temperature",
    "n_probs": "logprobs",
}


def refuse_unsupported(fields: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]] = UNSUPPORTED) -> None:
    """Raise FieldError for the first of `fields` that asks for what `table` says is not done here."""
    for name in table.keys() & fields.keys():
        value = fields[name]
        if not any(value == nothing for nothing in (*_NOTHING, *table[name])):
            hint = f"use {_INSTEAD[name]}" if name in _INSTEAD else "leave it out"
            raise FieldError(f"{name} is not supported here; {hint}", name)
