"""A bundle as a Python object: text in, text out, at once or as it is generated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from serving import generation
from serving.backends import loader
from serving.backends.autotune import autotuner
from serving.backends.base import Backend, FloatArray
from serving.backends.verify_steps import SpeculationMode
from serving.bundle import Bundle, open_bundle
from serving.engine.api import MAX_LOGPROBS, Logprobs
from serving.engine.sampler import log_probabilities
from serving.errors import InputError
from serving.generation.ngram_table import load_ngram_table
from serving.generation.token_selection import supports_speculation
from serving.sampling import SamplingParams
from serving.sampling.constraints import Grammar, StructuredOutput, TokenConstraint, ends_without_text
from serving.sampling.detokenizer import TextStream, TokenBytes, load_tokenizer
from serving.support.suggestions import did_you_mean

_PARAMETERS = [field.name for field in dataclasses.fields(SamplingParams)]


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued by; `str(completion)` is its text.

    `token_ids` ends with the token that ended it, if one did. `finish_reason` is "stop" for the end-of-text token, a
    stop text or a stop token, and "length" for `max_new_tokens` or the end of the context.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: tuple[Logprobs, ...] | None = None
    """One for each of `token_ids`: its log-probability (nats) and the most likely tokens; None if not asked for."""

    def __str__(self) -> str:
        return self.text


class CompletionStream(Iterator[str]):
    """The text of one completion in parts, as `Model.stream` generates it. The parts joined are the completion's text.

    A part never ends inside a character, nor holds text that may still become a stop text.
    """

    def __init__(self, builder: _Builder, tokens: Iterator[int]) -> None:
        self._builder, self._tokens, self._ended = builder, tokens, False

    def __next__(self) -> str:
        while not self._ended:
            token = next(self._tokens, None)
            self._ended = token is None or self._builder.push(token)
            if self._ended:
                self._builder.finish()
            if part := self._builder.take():
                return part
        raise StopIteration

    @property
    def completion(self) -> Completion:
        """What was generated so far, which is all of it once the stream has ended."""
        return self._builder.completion()


class Model:
    """A bundle, loaded in one runtime. Made by `load`; used by one thread at a time."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.tokenizer = load_tokenizer(bundle)
        self._token_bytes = TokenBytes(self.tokenizer)
        self._eos = bundle.manifest.model.eos_token_id

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, *, logprobs: int | None = None, **sampling: Any
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Continue one prompt, or several as one batch; return one Completion, or a list of them in order.

        Args:
            prompts: a text or a list of texts. An empty text starts from the end-of-text token.
            params: how to sample, one for all prompts or one for each.
            logprobs: how many of the most likely tokens to report at each position, from 0 to 20, with the
                log-probability of the token itself. They are the model's own: before temperature, bias and penalties.
            sampling: fields of SamplingParams by name, such as `max_new_tokens=16`, in place of `params`. `stop` may be
                one text.

        Raises InputError for an unknown field or a value out of range, and for a prompt that leaves no room in the
        context.
        """
        several = not isinstance(prompts, str)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        every = [params] if isinstance(params, SamplingParams) or params is None else list(params)
        every = [_params(each, sampling) for each in (every * len(texts) if len(every) == 1 else every)]
        if len(every) != len(texts):
            raise InputError(f"{len(texts)} prompts but {len(every)} sets of sampling parameters; give one for each")
        builders = [self._builder(*each, logprobs) for each in zip(texts, every, strict=True)]
        if not builders:
            return []
        generation.generate(
            self.backend,
            [builder.prompt for builder in builders],
            every,
            self._eos,
            lambda row, token: builders[row].push(token),
            None if logprobs is None else lambda row, token, logits: builders[row].score(token, logits),
        )
        for builder in builders:
            builder.finish()
        completions = [builder.completion() for builder in builders]
        return completions if several else completions[0]

    def stream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        **sampling: Any,
    ) -> CompletionStream:
        """Continue one prompt and iterate over its text as it is generated; see `generate` for the arguments.

        With a `grammar` from `compile`, the text follows it, and ends where nothing may follow. The errors of
        `generate` are raised here, not at the first part; a part may raise ConstraintError.
        """
        params = _params(params, sampling)
        constraint = (
            None if grammar is None else grammar.start(ends_without_text(params, self._eos, self._token_bytes.special))
        )
        builder = self._builder(prompt, params, logprobs, constraint)
        on_logits = None if logprobs is None else lambda row, token, logits: builder.score(token, logits)
        return CompletionStream(
            builder, generation.stream(self.backend, builder.prompt, params, self._eos, on_logits, constraint)
        )

    def compile(self, structured: StructuredOutput) -> Grammar:
        """Compile what generated text must be, for `stream`.

        Raises InputError for what is not valid or too complex, and RuntimeMissingError without the extra 'guided'.
        """
        from serving.sampling.grammars import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.bundle.manifest.model.vocab_size, self._eos).compile(structured)

    def _builder(
        self, text: str, params: SamplingParams, logprobs: int | None, constraint: TokenConstraint | None = None
    ) -> _Builder:
        if not isinstance(text, str):
            raise InputError(f"a prompt is {type(text).__name__}; it must be a text")
        if logprobs is not None and (isinstance(logprobs, bool) or not 0 <= logprobs <= MAX_LOGPROBS):
            raise InputError(f"logprobs is {logprobs!r}; it must be from 0 to {MAX_LOGPROBS}")
        try:
            text.encode("utf-8")
        except UnicodeError:
            raise InputError("a prompt is not valid Unicode text; remove its lone surrogates") from None
        prompt = self.tokenizer.encode(text, add_special_tokens=False).ids or [self._eos]
        return _Builder(prompt, params, logprobs, self._token_bytes, self._eos, constraint)


def load(
    bundle: str | os.PathLike[str],
    *,
    graph: str | None = None,
    runtime: str = "onnx",
    device: str = "cpu",
    threads: int | None = None,
    batch_size: int = 1,
    speculation: SpeculationMode = "auto",
    prefill_graph: str = "auto",
) -> Model:
    """Load the bundle in a folder and return its Model.

    Args:
        bundle: the bundle's folder.
        graph: an ONNX graph by its name in the manifest, such as "ort/int8"; None is "ort/fp32". "auto" measures once
            which number of threads is the fastest on this machine, and "auto:int8" also which precision down to int8.
        runtime: "onnx" or "tensorflow". Only this one is imported.
        device: "cpu", "cuda" or "cuda:N", for ONNX Runtime; TensorFlow finds its devices by itself.
        threads: threads of ONNX Runtime; None is its default, or what "auto" chooses.
        batch_size: the number of prompts that "auto" measures with. It does not limit `generate`.
        speculation: "auto" decodes a single prompt speculatively, with the same tokens, where the certificate proves
            it for "ort/fp32" on a CPU and drafts gain time; "on" also does so in quantized graphs, with a second copy
            of their weights; "off" never does.
        prefill_graph: the ONNX graph that prefills prompts. "auto" is the one that the certificate names for `graph`
            ("ort/int8" for "ort/int4"), which takes memory of its own, or `graph` itself; "same" is always `graph`.

    Raises InputError for a folder that does not exist and for an unknown graph, runtime or device, BundleError if the
    folder is not an intact bundle, and RuntimeMissingError if the runtime is not installed.
    """
    opened = open_bundle(Path(bundle), check="sizes")
    tuner = autotuner(
        graph, runtime=runtime, devices=[device], threads=threads, batch_size=batch_size, prefill_graph=prefill_graph
    )
    if tuner is not None:
        setting = tuner.choose(opened)
        graph, threads = setting.graph, setting.threads
    backend = loader.load_backend(opened, runtime, graph, device, threads, speculation, prefill_graph)
    if supports_speculation(backend):
        backend.draft_table = load_ngram_table(opened)
    return Model(opened, backend)


class _Builder:
    """One completion while it is generated."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        logprobs: int | None,
        token_bytes: TokenBytes,
        eos: int,
        constraint: TokenConstraint | None,
    ) -> None:
        self.prompt, self._constraint = prompt, constraint
        self._ends = params.end_ids(eos)
        self._stream = TextStream(token_bytes, params.stop_automaton)
        self._wanted = logprobs or 0
        self._logprobs: list[Logprobs] | None = None if logprobs is None else []
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._taken = 0

    def score(self, token: int, logits: FloatArray) -> None:
        """Keep the log-probabilities of `token`, which was sampled from `logits` [vocab]."""
        assert self._logprobs is not None
        self._logprobs.append(log_probabilities(logits, token, self._wanted))

    def push(self, token: int) -> bool:
        """Take one token; True once a stop text has ended the completion."""
        self._token_ids.append(token)
        self._text.append(self._stream.push(token))
        return self._stream.stopped

    def finish(self) -> None:
        """Add the text that waited for more tokens."""
        self._text.append(self._stream.finish())

    def take(self) -> str:
        """The text that came since the last call."""
        part = "".join(self._text[self._taken :])
        self._taken = len(self._text)
        return part

    def completion(self) -> Completion:
        """What there is by now."""
        ended = self._stream.stopped or (bool(self._token_ids) and self._token_ids[-1] in self._ends)
        ended = ended or (self._constraint is not None and self._constraint.done)
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason="stop" if ended else "length",
            prompt_tokens=len(self.prompt),
            logprobs=logprobs,
        )


def _params(params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
    """`params`, or the SamplingParams that `sampling` names."""
    if params is not None:
        if sampling:
            raise InputError(f"{next(iter(sampling))} was given with a SamplingParams; put it into that one")
        return params
    unknown = next((name for name in sampling if name not in _PARAMETERS), None)
    if unknown is not None:
        raise InputError(f"no sampling parameter {unknown!r}{did_you_mean(unknown, _PARAMETERS)}")
    stop = sampling.get("stop")
    return SamplingParams(**({**sampling, "stop": (stop,)} if isinstance(stop, str) else sampling))
