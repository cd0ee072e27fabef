"""From a bundle to tokens: the bundle's contract, the runtimes, and what talks to them.

`load`, `Model`, `Completion`, `CompletionStream` and `SamplingParams` are what a program imports from here. They are
imported when they are first used, so `import serving` loads neither a runtime nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.model import Completion, CompletionStream, Model, load
    from serving.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["Completion", "CompletionStream", "Model", "SamplingParams", "load"]

_HOMES = {name: "serving.sampling" if name == "SamplingParams" else "serving.model" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
