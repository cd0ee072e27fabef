"""The fields by which a request says what its text must be: OpenAI's `response_format` and vLLM's `guided_*`."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ConfigDict, Field

from serving.errors import InputError
from serving.sampling.constraints import MAX_CHOICES, MAX_TEXT, StructuredOutput
from serving.server.errors import FieldError
from serving.server.request_bodies import RequestBody

_Text = str | None
_Choices = list[str] | None
_LONGEST: dict[str, Any] = {"maxLength": MAX_TEXT}
_MOST: dict[str, Any] = {"maxItems": MAX_CHOICES}


class JsonSchemaFormat(RequestBody):
    """OpenAI's wrapping of a schema."""

    model_config = ConfigDict(populate_by_name=True)

    name: str | None = Field(None, description="Ignored.")
    description: str | None = Field(None, description="Ignored.")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Ignored: a schema is always followed.")


class ResponseFormat(RequestBody):
    """What the text must be, as OpenAI writes it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="With the type json_schema.")


class StructuredOutputs(RequestBody):
    """What the text must be, as vLLM writes it: one of its fields."""

    model_config = ConfigDict(populate_by_name=True, extra="forbid")

    json_: str | dict[str, Any] | None = Field(None, alias="json", description="A JSON Schema.")
    regex: _Text = Field(
        None, description="A regular expression that the whole text matches.", json_schema_extra=_LONGEST
    )
    choice: _Choices = Field(None, description="The texts to choose from.", json_schema_extra=_MOST)
    grammar: _Text = Field(None, description="A grammar, in Lark or GBNF syntax.", json_schema_extra=_LONGEST)
    json_object: bool | None = Field(None, description="Any JSON object.")
    structural_tag: Any = Field(None, description="Not supported.")
    disable_any_whitespace: bool | None = Field(None, description="JSON without blanks between its tokens.")
    disable_fallback: bool | None = Field(None, description="Ignored: there is one implementation.")
    disable_additional_properties: Literal[False] | None = Field(
        None, description="Not supported: say so in the schema."
    )
    whitespace_pattern: None = Field(None, description="Not supported.")


class StructuredOutputFields(RequestBody):
    """The fields of a body that say what its text must be; one of them at most."""

    response_format: ResponseFormat | None = Field(None, description="What the text must be, as OpenAI writes it.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The same, as vLLM writes it.")
    guided_json: str | dict[str, Any] | None = Field(None, description="A JSON Schema that the text follows.")
    guided_regex: _Text = Field(None, description="A regular expression that it matches.", json_schema_extra=_LONGEST)
    guided_choice: _Choices = Field(None, description="The texts to choose from.", json_schema_extra=_MOST)
    guided_grammar: _Text = Field(None, description="A grammar, in Lark or GBNF syntax.", json_schema_extra=_LONGEST)

    def structured_output(self) -> tuple[str, StructuredOutput] | None:
        """What the text must be and the field that says so, None where nothing does.

        Raises FieldError for two fields that do, and for one that makes no sense.
        """
        given = [*self._given(), *self._given_to_vllm()]
        if not given:
            return None
        if len(given) > 1:
            names = f"{given[0][0]} and {given[1][0]}"
            raise FieldError(f"{names} both say what the text must be; leave one out", given[1][0])
        name, kind, value = given[0]
        compact = self.structured_outputs is not None and bool(self.structured_outputs.disable_any_whitespace)
        try:
            if kind == "choice":
                return name, StructuredOutput("choice", choices=tuple(value))
            text = json.dumps(value) if isinstance(value, dict) else value
            return name, StructuredOutput(kind, text, any_whitespace=not compact)
        except InputError as error:
            raise FieldError(f"{name}: {error}", name) from None

    def _given(self) -> list[tuple[str, Any, Any]]:
        """Each field with a value, and what it is."""
        found: list[tuple[str, Any, Any]] = []
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            found.append(("response_format", "json_object", ""))
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise FieldError("response_format of type json_schema needs json_schema.schema", "response_format")
            found.append(("response_format", "json_schema", wanted.json_schema.schema_))
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found.append((f"guided_{kind}", "json_schema" if kind == "json" else kind, value))
        return found

    def _given_to_vllm(self) -> list[tuple[str, Any, Any]]:
        """The same for the fields of `structured_outputs`."""
        wanted = self.structured_outputs
        if wanted is None:
            return []
        if wanted.structural_tag is not None:
            raise FieldError(
                "structured_outputs.structural_tag is not supported here; write a grammar", "structured_outputs"
            )
        found: list[tuple[str, Any, Any]] = []
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(wanted, "json_" if kind == "json" else kind)
            if value is not None:
                found.append((f"structured_outputs.{kind}", "json_schema" if kind == "json" else kind, value))
        if wanted.json_object:
            found.append(("structured_outputs.json_object", "json_object", ""))
        if not found:
            raise FieldError(
                "structured_outputs says nothing; give json, regex, choice, grammar or json_object",
                "structured_outputs",
            )
        return found
