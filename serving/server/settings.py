"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and safety of one server; times are in seconds."""

    request_timeout: float | None = 600.0
    """From arrival to the last token, the queue included; None is without end. Requests may ask for less."""
    body_timeout: float = 30.0
    """For a request's body to come in."""
    ping_seconds: float = 15.0
    """Between two comment lines in a stream that has no token yet; 0 sends none."""
    drain_timeout: float = 30.0
    """For accepted requests to end once the server is told to."""
    max_body_bytes: int = 4 * MEBIBYTE
    max_bodies_bytes: int = 256 * MEBIBYTE
    """Of all requests whose answers have not begun, as they came."""
    max_connections: int = 1000
    """Open at once; more are refused. Files that the process may have open bound it too."""
    max_prompts: int = 1024
    """Prompts, or rows, in one request."""
    max_prompt_tokens: int | None = None
    """Tokens in one prompt; None leaves it at what the model's context has room for."""
    api_keys: tuple[str, ...] = ()
    """Without any, everyone may ask."""
    wrong_keys: float | None = 60
    """Requests a minute without a known key for each client address, where there are keys."""
    rate_limit: float | None = None
    """Requests a minute for each key, or for each client address where there are no keys."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server; "*" is all."""
