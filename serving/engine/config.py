"""The engine's settings, each with its bounds, and how much memory they ask for."""

from __future__ import annotations

from dataclasses import dataclass

from serving.backends.prefill_graph import AUTO, find_prefill_graph
from serving.backends.verify_steps import SpeculationMode, check_speculation, wants_verify_session
from serving.bundle import Bundle
from serving.engine.slot_backend import cache_bytes, scored_tokens
from serving.errors import InputError

SHARED_CHUNK = 16
"""Granularity of the prefix cache, in tokens."""


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs. Raises InputError, naming the field, for a value out of its range."""

    slots: int = 16
    """Maximum number of sequences decoded concurrently; from 1 to 1024."""
    max_length: int | None = None
    """Maximum length of a sequence, prompt included; from 2 to the model's context, which is the default."""
    prefill_chunk: int | None = None
    """Tokens of a prefill chunk while sequences decode, from 1 to 4096; None lets `prefill_slowdown` decide."""
    prefix_cache: bool = True
    """Whether a prompt reuses the KV cache of a prefix, in multiples of 16 tokens (or of a smaller `prefill_chunk`)."""
    prefill_slowdown: float = 2.25
    """Upper bound on a step with a prefill chunk, as a multiple of a decode-only step; from 1 to 1000.

    Each waiting prompt allows as much again, so steps are longer where several wait.
    """
    max_num_batched_tokens: int = 512
    """Tokens of one step at most: a prefill chunk, and one for each running sequence; from 1 to 65536.

    A prompt is never stalled: at least 2 tokens of it are read in a step, and one chunk where nothing decodes.
    """
    queue_limit: int = 256
    """Maximum number of waiting requests; from 0 to 1000000. Further ones are refused."""
    threads: int | None = None
    """Threads of the runtime, from 1 to 1024; None means the runtime's default."""
    speculation: SpeculationMode = "auto"
    """Whether a sequence that runs alone is decoded speculatively, with the tokens of plain decoding: see
    `serving.backends.verify_steps.speculates`."""
    prefill_graph: str = AUTO
    """The graph that prefills prompts: "auto" for the one that the certificate names for the graph that decodes, if
    any; "same" for that graph itself; or a name."""
    default_timeout: float | None = None
    """Time limit in seconds of a request that sets none, above 0; None means no limit."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("slots", 1, 1024),
            ("max_length", 2, 2**31 - 1),
            ("prefill_chunk", 1, 4096),
            ("max_num_batched_tokens", 1, 65536),
            ("queue_limit", 0, 1_000_000),
            ("threads", 1, 1024),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_length", "prefill_chunk", "threads"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} is {value!r}; it must be an integer from {low} to {high}")
        slowdown = self.prefill_slowdown
        if isinstance(slowdown, bool) or not 1 <= slowdown <= 1000:
            raise InputError(f"prefill_slowdown is {slowdown!r}; it must be a number from 1 to 1000")
        check_speculation(self.speculation)
        if not isinstance(self.prefill_graph, str) or not self.prefill_graph:
            raise InputError(f"prefill_graph is {self.prefill_graph!r}; it must be 'auto', 'same' or a graph's name")
        timeout = self.default_timeout
        if timeout is not None and (isinstance(timeout, bool) or not timeout > 0):
            raise InputError(f"default_timeout is {timeout!r}; it must be a number of seconds above 0")

    def length(self, n_positions: int) -> int:
        """Length of a slot for a context of `n_positions`. Raises InputError if `max_length` exceeds it."""
        if self.max_length is not None and self.max_length > n_positions:
            raise InputError(f"max_length is {self.max_length}; the model's context is {n_positions}")
        return self.max_length or n_positions


@dataclass(frozen=True)
class MemoryEstimate:
    """Upper bound on the bytes that an engine needs."""

    weights: int
    cache: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.logits


def estimate_memory(bundle: Bundle, graph_name: str, config: EngineConfig, device: str = "cpu") -> MemoryEstimate:
    """What `graph_name` of `bundle` will take in an engine of `config` on `device`, without loading it.

    Weights are counted three times: while it loads, the file is in memory, and the runtime holds a copy and packed
    matrices. That is a bound on the safe side, not a measurement. A runtime's code and working memory are not in it.
    """
    geometry, graph = bundle.manifest.model, bundle.graph(graph_name)
    dtypes = [spec.dtype for name, spec in graph.inputs.items() if name.startswith("past_key_values.")]
    length = config.length(geometry.n_positions)
    sessions = 1 + (config.speculation == "on" and wants_verify_session(bundle, graph_name))
    prefill_graph = find_prefill_graph(bundle, graph_name, config.prefill_graph, device)
    prefill_weights = 0 if prefill_graph is None else 2 * bundle.graph_size(prefill_graph)
    return MemoryEstimate(
        weights=2 * bundle.graph_size(graph_name) * sessions + prefill_weights,
        cache=cache_bytes(geometry, config.slots, length, dtypes[0] if dtypes else "float32"),
        logits=(config.slots + 1 + scored_tokens(geometry.vocab_size, length)) * geometry.vocab_size * 4,
    )
