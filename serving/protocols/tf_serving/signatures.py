"""The SavedModel's signatures for generation, text and scores, run by the engine: same names, types, shapes, sentences.

What `builder/tf_export/servable.py` and `text_signatures.py` do in the graph is done here for a request's rows; the
signatures that move caches or slots (prefill, decode, ..._slots) have no counterpart, since the engine keeps those
itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.engine.api import Engine, GenerationRequest
from serving.errors import InputError, cut
from serving.protocols.batch_completion import RowCompletion, complete
from serving.protocols.texts import TooLongError, decode, encode_prompts, encode_texts
from serving.sampling import MAX_SEED, MAX_TEMPERATURE, SamplingParams
from serving.server.auth import CALLER
from serving.server.tracing import OpenSpan, Span

Arrays = dict[str, NDArray[Any]]
Kind = Literal["int32", "int64", "float32", "string"]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a signature: `kind` and how many axes it has, the first of which is the batch."""

    kind: Kind
    rank: int = 1

    @property
    def dtype(self) -> type:
        """numpy's type: object, holding bytes, for strings."""
        return {"int32": np.int32, "int64": np.int64, "float32": np.float32, "string": np.object_}[self.kind]

    @property
    def type_name(self) -> str:
        """TensorFlow's name of the type."""
        return {"int32": "DT_INT32", "int64": "DT_INT64", "float32": "DT_FLOAT", "string": "DT_STRING"}[self.kind]


@dataclass(frozen=True)
class Call:
    """What a request's rows share: the engine, seconds from now to the end, an id; how many rows there may be, and
    tokens in the prompt of one; its span."""

    engine: Engine
    timeout: float | None = None
    request_id: str = ""
    max_rows: int = 128
    max_prompt_tokens: int | None = None
    open_span: OpenSpan = Span


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs by name, and what is run on checked inputs."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    run: Callable[[Call, Arrays], Coroutine[Any, Any, Arrays]]


async def run(name: str, call: Call, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run signature `name` ("" is serving_default) on `inputs`, all of the signature's and no others.

    Raises InputError for what a signature refuses, and what `serving.protocols.batch_completion.complete` raises.
    """
    check_inputs(name, call, inputs)
    return await find(name).run(call, dict(inputs))


def check_names(signature: Signature, inputs: Mapping[str, Any]) -> None:
    """Raise InputError unless `inputs` have the names of the signature's."""
    missing = sorted(signature.inputs.keys() - inputs.keys())
    unknown = sorted(islice((name for name in inputs if name not in signature.inputs), 8))
    if missing or unknown:
        said = [f"missing: {', '.join(missing)}"] * bool(missing)
        said += [f"unknown: {', '.join(map(cut, unknown))}"] * bool(unknown)
        raise InputError(f"the signature takes {', '.join(signature.inputs)}; {'; '.join(said)}")


def check_inputs(name: str, call: Call, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Raise InputError unless `inputs` are those of signature `name`, by name, type, rank and rows."""
    signature = find(name)
    check_names(signature, inputs)
    for key, wanted in signature.inputs.items():
        value = inputs[key]
        if value.dtype != wanted.dtype:
            raise InputError(f"{key} must be {wanted.type_name}, and numpy's {value.dtype} was sent")
        if value.ndim != wanted.rank:
            raise InputError(f"{key} must have {wanted.rank} axes, and {value.ndim} were sent")
    first, *others = signature.inputs
    rows = len(inputs[first])
    for key in others:
        if len(inputs[key]) != rows:
            raise InputError(f"{key} must have one value for each row of {first}")
    if not 1 <= rows <= call.max_rows:
        raise InputError(f"the request has {rows} rows; it must have 1 to {call.max_rows}")


def find(name: str) -> Signature:
    """The signature `name`. Raises InputError in TensorFlow Serving's words."""
    try:
        return SIGNATURES[name or "serving_default"]
    except KeyError:
        raise InputError(f'Serving signature key "{cut(name)}" not found; there are {", ".join(SIGNATURES)}') from None


async def _serving_default(call: Call, inputs: Arrays) -> Arrays:
    rows = await _continue(call, await read_prompts(call, inputs), read_parameters(inputs))
    token_ids, lengths = padded([row.token_ids if row else () for row in rows], call.engine.eos_token_id)
    return {"token_ids": token_ids, "lengths": lengths}


async def _generate_text(call: Call, inputs: Arrays) -> Arrays:
    engine, parameters = call.engine, read_parameters(inputs)
    prompts = await read_prompts(call, inputs)
    rows = await _continue(call, prompts, parameters)
    stopped = [bool(row and row.token_ids and row.token_ids[-1] == engine.eos_token_id) for row in rows]
    return {
        "text": objects([row.text.encode("utf-8") if row else b"" for row in rows]),
        "lengths": np.array([len(row.token_ids) if row else 0 for row in rows], np.int32),
        "prompt_tokens": np.array([len(prompt) for prompt in prompts], np.int32),
        "finish_reason": objects([b"stop" if ended else b"length" for ended in stopped]),
    }


async def read_prompts(call: Call, inputs: Arrays) -> Sequence[Sequence[int]]:
    """The token ids of each row, given as such or as text, checked as the graph checks them. Raises InputError."""
    engine = call.engine
    if "text" not in inputs:
        return _prompts(call, inputs["token_ids"], inputs["lengths"])
    texts: list[bytes] = inputs["text"].tolist()
    too_long = f"the prompt is longer than the context of {engine.n_positions} tokens"
    if not all(texts):
        raise InputError("text may not be empty; the end-of-text token alone starts a new text")
    try:
        prompts = await encode_prompts(engine.tokenizer, [_text(text) for text in texts], engine.n_positions)
    except TooLongError:
        raise InputError(too_long) from None
    longest = max(map(len, prompts))
    if longest > engine.n_positions:
        raise InputError(f"{too_long}; the longest one has {longest}")
    _check_length(call, longest)
    return prompts


async def _tokenize(call: Call, inputs: Arrays) -> Arrays:
    rows = await encode_texts(call.engine.tokenizer, [_text(text) for text in inputs["text"].tolist()])
    token_ids, lengths = padded(rows, call.engine.eos_token_id)
    return {"token_ids": token_ids, "lengths": lengths}


async def _detokenize(call: Call, inputs: Arrays) -> Arrays:
    token_ids, lengths = inputs["token_ids"], inputs["lengths"]
    _check_ids(call.engine, token_ids)
    if lengths.min() < 0 or lengths.max() > token_ids.shape[1]:
        raise InputError("lengths must be 0 to the width of token_ids")
    rows = [row[:length].tolist() for row, length in zip(token_ids, lengths, strict=True)]
    texts = await decode(call.engine.tokenizer, rows)
    return {"text": objects([text.encode("utf-8") for text in texts])}


async def _score(call: Call, inputs: Arrays) -> Arrays:
    prompts = _prompts(call, inputs["token_ids"], inputs["lengths"])
    log_probs = np.zeros(inputs["token_ids"].shape, np.float32)
    # A row of one token has nothing before it: its log-probability is 0 by definition.
    scored = [index for index, prompt in enumerate(prompts) if len(prompt) > 1]
    one = SamplingParams(max_new_tokens=1)
    requests = [make_request(call, prompts[index], one, prompt_logprobs=0, prompt_only=True) for index in scored]
    for index, row in zip(scored, await complete(call.engine, requests, call.open_span), strict=True):
        assert row.prompt is not None and row.prompt.logprobs is not None
        for place, logprobs in enumerate(row.prompt.logprobs):
            log_probs[index, place] = 0.0 if logprobs is None else logprobs.own
    return {"log_probs": log_probs, "total": log_probs.sum(axis=-1)}


async def _continue(
    call: Call, prompts: Sequence[Sequence[int]], parameters: Sequence[SamplingParams]
) -> list[RowCompletion | None]:
    """Each prompt's continuation; None for one that fills the context, which the graph continues by nothing."""
    roomy = [index for index, prompt in enumerate(prompts) if len(prompt) < call.engine.n_positions]
    requests = [make_request(call, prompts[index], parameters[index]) for index in roomy]
    rows = await complete(call.engine, requests, call.open_span)
    made: dict[int, RowCompletion] = dict(zip(roomy, rows, strict=True))
    return [made.get(index) for index in range(len(prompts))]


def make_request(call: Call, prompt: Sequence[int], params: SamplingParams, **more: Any) -> GenerationRequest:
    """The engine's request for one row."""
    salt = f"{CALLER.get()} "
    return GenerationRequest(
        tuple(prompt), params, timeout=call.timeout, request_id=call.request_id, cache_salt=salt, **more
    )


def _check_length(call: Call, longest: int) -> None:
    """Refuse prompts over what this server takes, which may be less than the model's context."""
    if call.max_prompt_tokens is not None and longest > call.max_prompt_tokens:
        raise InputError(f"a prompt has {longest} tokens; this server takes at most {call.max_prompt_tokens}")


def _prompts(call: Call, token_ids: NDArray[Any], lengths: NDArray[Any]) -> list[list[int]]:
    """The rows without their padding, checked as the graph checks them."""
    _check_ids(call.engine, token_ids)
    width = token_ids.shape[1]
    if width > call.engine.n_positions:
        raise InputError(f"the prompt is longer than the context of {call.engine.n_positions} tokens")
    if lengths.min() < 1:
        raise InputError("lengths must be at least 1: a prompt may not be empty")
    if lengths.max() > width:
        raise InputError("lengths must not pass the end of token_ids")
    _check_length(call, int(lengths.max()))
    return [row[:length].tolist() for row, length in zip(token_ids, lengths, strict=True)]


def _check_ids(engine: Engine, token_ids: NDArray[Any]) -> None:
    if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= engine.vocab_size):
        raise InputError(f"token_ids must be from 0 to {engine.vocab_size - 1}, padding included")


def read_parameters(inputs: Arrays) -> list[SamplingParams]:
    """Each row's parameters, checked as the graph checks them and then within the bounds of SamplingParams."""
    counts, temperatures, top_ks, top_ps, seeds = (inputs[name] for name in _PARAMETERS)
    if counts.min() < 1:
        raise InputError("max_new_tokens must be at least 1")
    if not (np.isfinite(temperatures) & (temperatures >= 0)).all():
        raise InputError("temperature must be a finite number, 0 or more")
    if top_ks.min() < 0:
        raise InputError("top_k must be 0 (off) or more")
    if not ((top_ps > 0) & (top_ps <= 1)).all():
        raise InputError("top_p must be above 0 and at most 1")
    rows = zip(counts.tolist(), temperatures.tolist(), top_ks.tolist(), top_ps.tolist(), seeds.tolist(), strict=True)
    return [
        # The graph has no upper bound for a temperature, and takes a seed's 64 bits whatever their sign.
        SamplingParams(
            max_new_tokens=count,
            temperature=min(temperature, MAX_TEMPERATURE),
            top_k=top_k,
            top_p=top_p,
            seed=_seed(seed),
        )
        for count, temperature, top_k, top_p, seed in rows
    ]


def _seed(seed: int) -> int:
    if seed == -1:  # No seed, as vLLM and llama.cpp have it.
        return secrets.randbelow(MAX_SEED)
    if seed < 0:
        raise InputError(f"seed must be from 0 to {MAX_SEED}, or -1 for none")
    return seed


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """`rows` as [rows, longest] int32, padded on the right with `fill`, and their lengths [rows] int32."""
    lengths = np.array([len(row) for row in rows], np.int32)
    token_ids = np.full((len(rows), int(lengths.max())), fill, np.int32)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
    return token_ids, lengths


def objects(values: Sequence[bytes]) -> NDArray[Any]:
    """`values` as [len(values)] objects, which is what strings are in numpy here."""
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


_TOKENS = {"token_ids": Tensor("int32", 2), "lengths": Tensor("int32")}
_TEXT = {"text": Tensor("string")}
_PARAMETERS = {
    "max_new_tokens": Tensor("int32"),
    "temperature": Tensor("float32"),
    "top_k": Tensor("int32"),
    "top_p": Tensor("float32"),
    "seed": Tensor("int64"),
}
SIGNATURES: dict[str, Signature] = {
    "serving_default": Signature({**_TOKENS, **_PARAMETERS}, _TOKENS, _serving_default),
    "generate_text": Signature(
        {**_TEXT, **_PARAMETERS},
        {
            **_TEXT,
            "lengths": Tensor("int32"),
            "prompt_tokens": Tensor("int32"),
            "finish_reason": Tensor("string"),
        },
        _generate_text,
    ),
    "tokenize": Signature(_TEXT, _TOKENS, _tokenize),
    "detokenize": Signature(_TOKENS, _TEXT, _detokenize),
    "score": Signature(_TOKENS, {"log_probs": Tensor("float32", 2), "total": Tensor("float32")}, _score),
}
