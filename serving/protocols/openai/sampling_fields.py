"""The fields that bodies of completions and of chat completions share: how to sample, when to stop, how to answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from serving.engine.api import MAX_CONTINUATIONS
from serving.protocols.openai.structured_output import StructuredOutputFields
from serving.protocols.openai.unsupported import refuse_unsupported
from serving.sampling import DECLARATIONS, MAX_BIAS
from serving.server.request_bodies import MAX_ID, RequestBody, token_ids, whole_number

MAX_BIASES = 131_072
"""More than any vocabulary that is served has."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
"""Characters of one; a call's continuations share an automaton of as many states."""
MAX_STOP_IDS = 1024
ID = {"type": "integer", "minimum": 0, "maximum": MAX_ID}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


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
    # Every comparison with a NaN is false, but min and max may overlook one; the sum of all does not.
    if amounts and not (min(amounts) >= -MAX_BIAS and max(amounts) <= MAX_BIAS and abs(sum(amounts)) >= 0):
        raise ValueError(problem)
    return dict(zip(map(int, value), map(float, amounts), strict=True))


def _stop_ids(value: Any) -> list[int]:
    return token_ids(value, MAX_STOP_IDS)


Whole = BeforeValidator(whole_number)


def _within(name: str, **other: Any) -> Any:
    """The bounds of a sampling parameter that is a number."""
    each = DECLARATIONS[name]
    kind = int if each.kind == "integer" else float
    return Field(**{"gt" if each.above_low else "ge": kind(each.low), "le": kind(each.high), **other})


def _meaning(name: str, description: str = "") -> Any:
    """The field of a sampling parameter, which may be left out."""
    return Field(None, description=description or DECLARATIONS[name].help)


_Natural = Annotated[int, Field(ge=0, le=MAX_ID), Whole]


class StreamOptions(RequestBody):
    """What a stream carries beside its text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has no choices but the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: each chunk has the usage up to it, as with vLLM."
    )


class SamplingFields(StructuredOutputFields):
    """What completions and chat completions share; null is the same as leaving a field out.

    A field of other servers that would change the answer and is not done here is refused; others are ignored.
    """

    model: str | None = Field(None, description="A name from /v1/models; the first one if left out.")
    max_tokens: _Natural | None = Field(None, description="Tokens to add at most.")
    max_completion_tokens: _Natural | None = Field(None, description="Another name of max_tokens.")
    temperature: Annotated[float, _within("temperature")] | None = _meaning("temperature")
    top_p: Annotated[float, _within("top_p")] | None = _meaning("top_p")
    n: Annotated[int, Field(ge=1, le=MAX_CONTINUATIONS), Whole] | None = Field(
        None, description="Continuations of each prompt."
    )
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
    seed: Annotated[int, _within("seed", ge=-(2**63)), Whole] | None = _meaning(
        "seed", "Equal seeds give equal text; -1 is none."
    )
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = _meaning("presence_penalty")
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = _meaning("frequency_penalty")
    stream: bool | None = Field(None, description="Answer with server-sent events, a chunk at a time.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    top_k: Annotated[int, _within("top_k", ge=-1), Whole] | None = _meaning(
        "top_k", "Sample among the k most likely tokens; 0 and -1 consider all."
    )
    min_p: Annotated[float, _within("min_p")] | None = _meaning("min_p")
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = _meaning("repetition_penalty")
    min_tokens: Annotated[int, _within("min_tokens"), Whole] | None = _meaning("min_tokens")
    ignore_eos: bool | None = _meaning("ignore_eos")
    stop_token_ids: (
        Annotated[
            list[int],
            BeforeValidator(_stop_ids),
            WithJsonSchema({"type": "array", "items": ID, "maxItems": MAX_STOP_IDS}),
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
    def _one_name_each(self) -> SamplingFields:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ; leave one out")
            self.max_tokens = self.max_completion_tokens
        if self.seed == -1:
            self.seed = None
        return self
