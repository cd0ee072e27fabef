"""The bodies of the OpenAI completions protocol and of vLLM's /tokenize and /detokenize, as pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from serving.engine.api import MAX_CONTINUATIONS, MAX_LOGPROBS
from serving.protocols.openai.unsupported import refuse_unsupported
from serving.sampling import MAX_BIAS, MAX_TEMPERATURE
from serving.server.request_bodies import MAX_ID, RequestBody, token_ids, whole_number

MAX_PROMPTS = 4096
"""In one body; a server takes fewer."""
MAX_BIASES = 131_072
"""More than any vocabulary that is served has."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
"""Characters of one; a call's continuations share an automaton of as many states."""
MAX_STOP_IDS = 1024
_ID = {"type": "integer", "minimum": 0, "maximum": MAX_ID}
_IDS = {"type": "array", "items": _ID, "minItems": 1}

_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}

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


def _stops(value: Any) -> list[str]:
    """`stop` as a list."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise ValueError(f"must have at most {MAX_STOPS} strings")
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError("must be a non-empty string or a list of them")
    if any(len(text) > MAX_STOP_LENGTH for text in stops):
        raise ValueError(f"must be of at most {MAX_STOP_LENGTH} characters")
    return stops


def _bias(value: Any) -> dict[int, float]:
    """`logit_bias`, whose keys JSON can only write as strings."""
    problem = f"must give token ids, as strings, numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}"
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(problem)
    if len(value) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} token ids")
    # Each check runs over all of them without a loop of Python's own, since there may be a vocabulary of them.
    amounts = list(value.values())
    ids = all(map(str.isascii, value)) and all(map(str.isdigit, value)) and max(map(len, value), default=0) <= 10
    if not ids or not set(map(type, amounts)) <= {int, float}:
        raise ValueError(problem)
    # A number that is none is no greater and no less than any other; the sum of all shows it.
    if amounts and not (min(amounts) >= -MAX_BIAS and max(amounts) <= MAX_BIAS and abs(sum(amounts)) >= 0):
        raise ValueError(problem)
    return dict(zip(map(int, value), map(float, amounts), strict=True))


def _texts(value: Any) -> str | list[str]:
    """A text, or several."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"must have 1 to {MAX_PROMPTS} texts")
    if not isinstance(value, list) or set(map(type, value)) != {str}:
        raise ValueError("must be a string or a list of strings")
    return value


def _stop_ids(value: Any) -> list[int]:
    return token_ids(value, MAX_STOP_IDS)


Texts = Annotated[
    str | list[str],
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
_Whole = BeforeValidator(whole_number)
_Natural = Annotated[int, Field(ge=0, le=MAX_ID), _Whole]


class StreamOptions(RequestBody):
    """What a stream carries beside its text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has no choices but the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: each chunk has the usage up to it, as with vLLM."
    )


class CompletionRequest(RequestBody):
    """A prompt to continue; null is the same as leaving a field out.

    A field of other servers that would change the answer and is not done here is refused; others are ignored.
    """

    model: str | None = Field(None, description="A name from /v1/models; the first one if left out.")
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
    max_tokens: _Natural | None = Field(None, description="Tokens to add at most; 0 only with echo.")
    max_completion_tokens: _Natural | None = Field(None, description="Another name of max_tokens.")
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: Annotated[int, Field(ge=1, le=MAX_CONTINUATIONS), _Whole] | None = Field(
        None, description="Continuations of each prompt."
    )
    best_of: Annotated[int, _Whole] | None = Field(None, description="Only what n is.")
    stop: Annotated[
        list[str],
        BeforeValidator(_stops),
        WithJsonSchema(
            {
                "anyOf": [
                    _STOP,
                    {"type": "array", "items": _STOP, "maxItems": MAX_STOPS},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(default_factory=list, description="Text that ends a continuation and is not part of it.")
    echo: bool | None = Field(None, description="Give the prompt back before its continuation.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Whole] | None = Field(
        None, description="How many of the likeliest tokens to report."
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Whole] | None = Field(
        None,
        description="Report the prompt's own tokens, and so many of the likeliest at their places; not in streams.",
    )
    logit_bias: Annotated[
        dict[int, float],
        BeforeValidator(_bias),
        WithJsonSchema(
            {
                "anyOf": [
                    {
                        "type": "object",
                        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                        "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(default_factory=dict, description="Added to tokens' logits, by id.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _Whole] | None = Field(
        None, description="Equal seeds give equal text; -1 is none."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stream: bool | None = Field(None, description="Answer with server-sent events, a chunk at a time.")
    stream_options: StreamOptions | None = None
    suffix: str | None = Field(None, description="Not supported; GPT-2 continues text only at its end.")
    user: str | None = Field(None, description="Ignored.")
    top_k: Annotated[int, Field(ge=-1, le=MAX_ID), _Whole] | None = Field(
        None, description="Sample among the k likeliest; 0 or -1 is all."
    )
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: _Natural | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[
            list[int],
            BeforeValidator(_stop_ids),
            WithJsonSchema({"type": "array", "items": _ID, "maxItems": MAX_STOP_IDS}),
        ]
        | None
    ) = None
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Only requests of the same salt share prefixes of prompts."
    )
    return_token_ids: bool | None = Field(None, description="Give each choice's token ids too, as they come.")

    @classmethod
    def refuse(cls, fields: Mapping[str, Any]) -> None:
        """See `RequestBody.refuse`."""
        refuse_unsupported(fields)

    @model_validator(mode="after")
    def _one_name_each(self) -> CompletionRequest:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ; leave one out")
            self.max_tokens = self.max_completion_tokens
        if self.seed == -1:
            self.seed = None
        return self


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


class ModelCard(BaseModel):
    """A model that is served here, as OpenAI and as TensorFlow Serving describe it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    example_prompt: str
    model_version_status: list[VersionState]


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeRequest(RequestBody):
    """Text to turn into token ids."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = Field(None, description="Ignored: GPT-2 adds none.")
    return_token_strs: bool | None = None


class Tokens(BaseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: Annotated[list[int], BeforeValidator(token_ids), WithJsonSchema({"type": "array", "items": _ID})]


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
