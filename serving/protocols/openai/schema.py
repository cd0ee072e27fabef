"""The bodies of the OpenAI completions protocol and of vLLM's /detokenize, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from serving.engine.api import MAX_LOGPROBS
from serving.protocols.openai.sampling_fields import ID, SamplingFields, Whole
from serving.server.request_bodies import MAX_ID, RequestBody, token_ids

MAX_PROMPTS = 4096
"""In one body; a server takes fewer."""
_IDS = {"type": "array", "items": ID, "minItems": 1}

Prompts = list[str] | list[list[int]]


def _prompts(value: Any) -> Prompts:
    """Any of the four forms of a prompt as a list of prompts of one kind, which the first item says."""
    problem = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    if value is None:
        return [""]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(problem)
    kind = type(value[0])
    if kind not in (str, list):
        return [token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"must have at most {MAX_PROMPTS} prompts")
    if set(map(type, value)) != {kind} or (not all(value) and kind is list):
        raise ValueError(problem)
    return value if kind is str else [token_ids(item) for item in value]


def _texts(value: Any) -> str | list[str]:
    """A text, or several."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"must have 1 to {MAX_PROMPTS} texts")
    if not isinstance(value, list) or set(map(type, value)) != {str}:
        raise ValueError("must be a string or a list of strings")
    return value


Texts = Annotated[
    str | list[str],
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class CompletionRequest(SamplingFields):
    """A prompt to continue."""

    default_max_tokens: ClassVar[int | None] = 16
    """None is what the context has room for."""
    prompt_field: ClassVar[str] = "prompt"
    """What errors of the prompt name."""

    prompt: Annotated[
        Prompts,
        BeforeValidator(_prompts),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    _IDS,
                    {"type": "array", "items": _IDS, "minItems": 1},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(default_factory=lambda: [""], description="Text or token ids; an empty text starts a new document.")
    max_tokens: Annotated[int, Field(ge=0, le=MAX_ID), Whole] | None = Field(
        None, description="Tokens to add at most; 0 only with echo."
    )
    best_of: Annotated[int, Whole] | None = Field(None, description="Only what n is.")
    echo: bool | None = Field(None, description="Give the prompt back before its continuation.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = Field(
        None, description="How many of the likeliest tokens to report."
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = Field(
        None,
        description="Report the prompt's tokens, and this many of the most likely at each position; not in streams.",
    )
    suffix: str | None = Field(None, description="Not supported; GPT-2 continues text only at its end.")


class Logprobs(BaseModel):
    """Log-probabilities in nats; the lists are parallel, one entry for each token."""

    tokens: list[str] = Field(description="A token that is not valid UTF-8 alone is written as bytes:\\xNN.")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where the token begins, in characters of the choice's text.")


class PromptLogprob(BaseModel):
    """A token at one place of a prompt."""

    logprob: float = Field(description="Nats.")
    rank: int = Field(description="1 is the likeliest.")
    decoded_token: str


class Choice(BaseModel):
    """One continuation, or the next piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = Field(description="The stop text or token id that ended it; null at its end token.")
    token_ids: list[int] | None = Field(None, description="Where asked for; without those of the prompt.")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        None, description="Where asked for: by token id, for each token of the prompt but the first."
    )


class PromptTokensDetails(BaseModel):
    """More about the prompt."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens; a prompt counts once, however many continuations it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(BaseModel):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="The version, and a hash of the bundle's files.")
    choices: list[Choice]
    usage: Usage | None = None


class VersionState(BaseModel):
    """TensorFlow Serving's ModelVersionStatus."""

    version: str
    state: Literal["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]
    status: dict[str, str]


class ModelStatus(BaseModel):
    """What TensorFlow Serving's clients get of a model."""

    model_version_status: list[VersionState]


class ModelCard(BaseModel):
    """A model that is served here, as OpenAI, KServe's V1 protocol and TensorFlow Serving describe it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    name: str = Field(description="The same as id, as in KServe's V1 protocol.")
    ready: bool = Field(description="Whether a version is available, as in KServe's V1 protocol.")
    max_model_len: int
    example_prompt: str
    example_message: str | None = Field(description="For chat completions; null where there is no chat template.")
    model_version_status: list[VersionState]


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: Annotated[list[int], BeforeValidator(token_ids), WithJsonSchema({"type": "array", "items": ID})]


class Text(BaseModel):
    """Text of token ids."""

    prompt: str


class ErrorDetail(BaseModel):
    """What is wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An answer of status 400 and above."""

    error: ErrorDetail
