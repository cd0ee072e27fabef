"""Which program sends a request, where several protocols share a path and no field of a request tells them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping

MODEL_PATH = re.compile(r"/v1/models/[^/:]+\Z")
"""OpenAI's card of a model, TensorFlow Serving's status and KServe's readiness."""


def is_openai_client(headers: Mapping[str, str]) -> bool:
    """Whether a client of OpenAI's may have sent `headers`: it has a key or asks for JSON, which the others do not."""
    return "authorization" in headers or "application/json" in headers.get("accept", "").lower()


def is_kserve_client(headers: Mapping[str, str]) -> bool:
    """Whether KServe's client for Python may have sent `headers`: it is httpx with httpx's own headers."""
    return headers.get("user-agent", "").startswith("python-httpx/") and headers.get("accept") == "*/*"
