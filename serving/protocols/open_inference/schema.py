"""The bodies of the Open Inference Protocol by HTTP, as pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.protocols.open_inference.signatures import OPTIONS, refuse_options
from serving.protocols.open_inference.tensors import MAX_AXES
from serving.protocols.openai.schema import CompletionRequest, Texts
from serving.server.request_bodies import RequestBody, whole_number

Parameters = dict[str, Any]
MAX_TENSORS = 64
"""Inputs of one request, and outputs; no signature has half as many."""


class Named(RequestBody):
    """A tensor by its name."""

    name: str
    parameters: Parameters = Field(default_factory=dict)


class InputTensor(Named):
    """An input, its values here or, as many bytes as its parameter `binary_data_size` says, after the JSON."""

    shape: list[Annotated[int, BeforeValidator(whole_number)]] = Field(max_length=MAX_AXES, fail_fast=True)
    datatype: str
    data: list[Any] | None = Field(None, description="In one list, row by row, or in nested lists.")


class RequestedOutput(Named):
    """An output that is wanted; its parameter `binary_data` wants it after the JSON."""


class InferBody(RequestBody):
    """A request for a signature's outputs."""

    id: str = Field("", description="Given back with the answer.")
    parameters: Parameters = Field(
        default_factory=dict,
        description="signature_name, binary_data_output, timeout (microseconds), and options that are no tensors.",
    )
    inputs: list[InputTensor] = Field(max_length=MAX_TENSORS, fail_fast=True)
    outputs: list[RequestedOutput] = Field(
        default_factory=list, max_length=MAX_TENSORS, fail_fast=True, description="All of them if left out."
    )


class OutputTensor(BaseModel):
    """An output; without `data`, its bytes are after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = Field(default_factory=dict)
    data: list[Any] | None = None


class InferAnswer(BaseModel):
    """A signature's outputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


def _with_options(schema: dict[str, Any]) -> None:
    """Write the options, which are checked as those of OpenAI's completions are, into the schema."""
    options = CompletionRequest.model_json_schema()["properties"]
    schema["properties"] |= {name: options[name] for name in OPTIONS}


class GenerateBody(RequestBody):
    """A text to continue; options stand next to it or in `parameters`. Fields that are not here are ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_options)

    @classmethod
    def refuse(cls, fields: Mapping[str, Any]) -> None:
        """See `RequestBody.refuse`."""
        refuse_options(fields)

    text_input: Texts = Field(description="Text; several, in a list, only without a stream.")
    id: str = Field("", description="Given back with the answer.")
    parameters: Parameters = Field(default_factory=dict)


class Generated(BaseModel):
    """A completion, or a part of one; for several texts, lists of what is here."""

    id: str | None = None
    model_name: str
    model_version: str
    text_output: str | list[str]
    token_ids: list[int] | list[list[int]]
    lengths: int | list[int]
    prompt_tokens: int | list[int]
    finish_reason: str | list[str] = Field(description='"stop" or "length"; "" in a piece that is not the last.')
