"""What all handlers of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.server.auth import Keys, RateLimiter
from serving.server.metrics import Metrics
from serving.server.registry import ModelRegistry, State
from serving.server.settings import Settings


@dataclass
class Server:
    """The models, settings, API keys, limits and metrics. Handlers find it as `request.app.state.server`."""

    registry: ModelRegistry
    settings: Settings = field(default_factory=Settings)
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    body_bytes: int = 0
    """Of requests whose answers have not begun; the event loop's."""

    def __post_init__(self) -> None:
        self.keys = Keys(self.settings.api_keys)
        self.limiter = RateLimiter(self.settings.rate_limit)
        self.wrong_keys = RateLimiter(self.settings.wrong_keys)

    def unready(self) -> str | None:
        """Why requests should go elsewhere, as a sentence; None when every model has a version that can answer."""
        if self.draining:
            return "the server is draining"
        names = self.registry.names()
        if not names:
            return "no model is loaded yet"
        for name in names:
            if not any(model.state == State.AVAILABLE for model in self.registry.versions(name)):
                return f"the model {name!r} is not ready yet"
        return None
