"""The bodies of chat completions, as pydantic models: messages, and what templates take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from serving.engine.api import MAX_LOGPROBS
from serving.protocols.openai.sampling_fields import SamplingFields, Whole
from serving.protocols.openai.schema import CompletionRequest, Usage
from serving.protocols.openai.unsupported import CHAT_UNSUPPORTED, refuse_unsupported
from serving.server.request_bodies import RequestBody

MAX_MESSAGES = 2048
MAX_PARTS = 256
"""Of one message."""
_MAX_VARIABLES = 1024
"""Values and characters of a call's chat_template_kwargs."""
_REFUSED = ("tool_calls", "function_call", "audio")
_TAKEN = ("messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt")
"""Variables of templates that a body has fields for, or that are not supported."""
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def _content(value: Any) -> Any:
    """A message's content as a text, or as a list of its parts' texts."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise ValueError(
            f"must be a string, or a list of 1 to {MAX_PARTS} parts such as {{'type': 'text', 'text': '...'}}"
        )
    return [_part(part) for part in value]


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        shown = f"a part of the type {str(kind)[:40]!r}" if isinstance(kind, str) else "a part without a type"
        raise ValueError(f"has {shown}; this model reads text alone, as {{'type': 'text', 'text': '...'}}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError("has a text part whose 'text' is no string")
    return text


def _variables(value: Any) -> Any:
    """`chat_template_kwargs`, if it is small."""
    pending, left = [value], _MAX_VARIABLES
    while pending and left >= 0:
        each = pending.pop()
        left -= 1 + (len(each) if isinstance(each, str | list | dict) else 0)
        if left >= 0 and isinstance(each, list | dict):
            pending += [*each, *each.values()] if isinstance(each, dict) else each
    if left < 0:
        raise ValueError(f"must have at most {_MAX_VARIABLES} values and characters")
    if isinstance(value, dict):
        for name in _TAKEN:
            if name in value:
                raise ValueError(f"has {name!r}, which is no variable of its own; leave it out")
    return value


class ChatMessage(RequestBody):
    """One turn of a conversation.

    The roles are OpenAI's, and `input`, which this project's templates have for a context. A template may refuse any.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "input"]
    content: Annotated[
        str | list[str] | None,
        BeforeValidator(_content),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": _TEXT_PART, "minItems": 1, "maxItems": MAX_PARTS},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(None, description="Text, or parts of the type text; null only of an assistant.")
    name: str | None = Field(None, max_length=256, description="For the template; most ignore it.")
    tool_call_id: str | None = Field(None, max_length=256, description="For the template; most ignore it.")

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in _REFUSED:
                if value.get(name):
                    raise ValueError(f"{name} is not supported here; leave it out")
        return value

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None:
            if self.role != "assistant":
                raise ValueError(f"content is missing, which a message of the role {self.role} needs")
            self.content = ""
        return self

    def for_template(self) -> dict[str, Any]:
        """What a template sees: what was given, null left out."""
        return self.model_dump(exclude_none=True)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class TemplateFields(RequestBody):
    """Messages, and how the chat template turns them into a prompt."""

    messages: Messages | None = None
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt where an answer begins; true unless continue_final_message is."
    )
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead.")
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_variables)] | None = Field(
        None, description="Further variables for the template."
    )


class ChatRequest(TemplateFields, SamplingFields):
    """A conversation to answer."""

    messages: Messages = Field(description="The conversation, oldest first.")
    logprobs: bool | None = Field(None, description="Report each token's log-probability.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = Field(
        None, description="How many of the likeliest tokens to report at each place; takes logprobs."
    )

    @classmethod
    def refuse(cls, fields: Mapping[str, Any]) -> None:
        """See `RequestBody.refuse`."""
        refuse_unsupported(fields, CHAT_UNSUPPORTED)
        super().refuse(fields)


class RenderedChat(CompletionRequest):
    """A conversation as the prompt that it is to the model. Unless it is said, the answer may fill the context."""

    default_max_tokens: ClassVar[int | None] = None
    prompt_field: ClassVar[str] = "messages"

    @classmethod
    def of(cls, chat: ChatRequest, text: str, end_ids: tuple[int, ...]) -> RenderedChat:
        """`chat` with its prompt's `text`, which ends at `end_ids` too. Its values have been checked."""
        shared = {name: getattr(chat, name) for name in SamplingFields.model_fields}
        ends = () if chat.ignore_eos else end_ids
        shared["stop_token_ids"] = list(dict.fromkeys([*(chat.stop_token_ids or ()), *ends]))
        logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        return cls.model_construct(**shared, prompt=[text], logprobs=logprobs)


class TokenizeRequest(TemplateFields):
    """A text, or a conversation, to turn into token ids."""

    model: str | None = None
    prompt: str | None = Field(None, description="Either this or messages.")
    add_special_tokens: bool | None = Field(None, description="Ignored: GPT-2 adds none.")
    return_token_strs: bool | None = None

    @classmethod
    def refuse(cls, fields: Mapping[str, Any]) -> None:
        """See `RequestBody.refuse`."""
        refuse_unsupported({name: value for name, value in fields.items() if name != "prompt"}, CHAT_UNSUPPORTED)


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TopLogprob(BaseModel):
    """A token, its bytes (null for a special token, which is no text), and its log-probability in nats."""

    token: str = Field(description="A token that is not valid UTF-8 alone is written as bytes:\\xNN.")
    bytes: list[int] | None
    logprob: float | None


class ChatLogprob(TopLogprob):
    """One token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the answer's tokens."""

    content: list[ChatLogprob]
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = Field(description="The stop text or token id that ended it; null at its end token.")
    token_ids: list[int] | None = Field(None, description="Where asked for.")


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="The version, and a hash of the bundle's files.")
    choices: list[ChatChoice]
    usage: Usage
