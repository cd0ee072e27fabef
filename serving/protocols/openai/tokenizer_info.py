"""vLLM's GET /tokenizer_info: what a client without the bundle's files needs of its tokenizer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.server.registry import ModelRegistry, ServedModel

CONFIG_NAME = "tokenizer_config.json"
MAX_CONFIG_BYTES = 4 << 20
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info: the tokenizer's configuration, each special token by its text."""
    registry: ModelRegistry = request.app.state.server.registry
    model = registry.get(request.query_params.get("model") or next(iter(registry.names()), ""))
    text = await asyncio.to_thread(lambda: json.dumps(describe(model)))
    return Response(text, media_type="application/json")


def describe(model: ServedModel) -> dict[str, Any]:
    """The bundle's tokenizer_config.json, if it has one, with what the model itself says of its tokens."""
    info = _config(model.bundle)
    for role in _ROLES:
        if isinstance(info.get(role), dict):  # A token with how it is matched; its text is what clients read.
            info[role] = info[role].get("content")
    engine = model.engine
    end = engine.tokenizer.id_to_token(engine.eos_token_id)
    info.setdefault("tokenizer_class", "GPT2Tokenizer")
    info.setdefault("bos_token", end)
    return {**info, "eos_token": end, "model_max_length": engine.n_positions}


def _config(bundle: Bundle) -> dict[str, Any]:
    if not any(each.path == CONFIG_NAME for each in bundle.manifest.artifacts):
        return {}
    data = bundle.read(CONFIG_NAME, MAX_CONFIG_BYTES)
    try:
        config = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BundleError(f"{bundle.path(CONFIG_NAME)}: not a JSON object; export the bundle again")
    return config


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def tokenizer_info_routes() -> list[Route]:
    """The routes of this module."""
    return [Route("/tokenizer_info", tokenizer_info)]
