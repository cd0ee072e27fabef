"""Grammars compiled by llguidance, the one module that imports it: schemas and the like to masks of allowed tokens."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from serving.errors import InputError, RuntimeMissingError
from serving.sampling.constraints import Allowed, ConstraintError, StructuredOutput, complaint

INSTALL = "structured output needs llguidance; install it with: pip install 'gpt2-bundle[guided]'"
# JSON's own rule allows any amount, and a weak model then writes blanks until its tokens are spent.
_WHITESPACE = r" |\n {0,32}"
# A mask that takes longer than these allow ends its own sequence. The library's defaults are two to ten times as high.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


def installed() -> bool:
    """Whether llguidance can be imported."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


class GrammarCompiler:
    """Compiles structured outputs for one vocabulary. May be used by several threads.

    Args:
        tokenizer: a byte-level one.
        vocab_size: of the model's logits; ids that the tokenizer does not have are never allowed.
        eos_token_id: the token that ends a text.

    To make one takes about half a second of the interpreter's time at GPT-2's vocabulary. Raises RuntimeMissingError
    where llguidance is not installed, InputError for another kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise RuntimeMissingError(INSTALL) from None
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise InputError("structured output needs a byte-level tokenizer, as GPT-2's is; this model has another")
        self._library: Any = llguidance
        self.vocab_size, self.eos_token_id = vocab_size, eos_token_id
        try:
            self._tokenizer: Any = llguidance.LLTokenizer(tokenizer.to_str(), vocab_size, eos_token_id)
        except BaseException as error:
            raise InputError(f"structured output does not work with this tokenizer: {_reason(error)}") from None
        self._limits: Any = llguidance.LLParserLimits(**_LIMITS)

    def compile(self, wanted: StructuredOutput) -> CompiledGrammar:
        """The grammar of `wanted`. Raises InputError, with the library's reason, for one that it does not take.

        Takes milliseconds, and a second for some of those that are refused as too complex; most of that time other
        threads may run.
        """
        try:
            matcher = self._library.LLMatcher(self._tokenizer, self._source(wanted), log_level=0, limits=self._limits)
        except BaseException as error:
            raise InputError(_reason(error)) from None
        if matcher.is_error():
            raise InputError(complaint(matcher.get_error()))
        return CompiledGrammar(matcher, self.vocab_size, self.eos_token_id)

    def _source(self, wanted: StructuredOutput) -> str:
        """`wanted` in the library's own form."""
        matcher = self._library.LLMatcher
        match wanted.kind:
            case "json_schema" | "json_object":
                overrides: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
                if wanted.any_whitespace:
                    overrides["whitespace_pattern"] = _WHITESPACE
                else:
                    overrides["whitespace_flexible"] = False
                schema = wanted.text if wanted.kind == "json_schema" else '{"type": "object"}'
                source = matcher.grammar_from_json_schema(schema, overrides=overrides)
            case "regex":
                source = matcher.grammar_from_regex(wanted.text)
            case "choice":
                # A terminal, which the lexer matches: as alternatives of a rule, many would be too many for the parser.
                source = "start: CHOICE\nCHOICE: " + " | ".join(
                    json.dumps(text, ensure_ascii=False) for text in wanted.choices
                )
            case "grammar":
                if wanted.text.lstrip().startswith("{"):
                    raise InputError("a grammar is in Lark or GBNF syntax, not JSON")
                from llguidance.gbnf_to_lark import any_to_lark

                try:
                    source = any_to_lark(wanted.text)
                except BaseException as error:
                    raise InputError(_reason(error)) from None
        return str(source)


def _reason(error: BaseException) -> str:
    """What the library says. It panics with a class of its own, which no `except Exception` stops; others pass."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return complaint(str(error) or type(error).__name__)


class CompiledGrammar:
    """See `serving.sampling.constraints.Grammar`.

    Its sequences share what the library learns on the way, and therefore a lock.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos_token_id: int) -> None:
        """Compute the tokens that a text may begin with. Raises InputError if there is no such text."""
        self._matcher, self.vocab_size, self.eos_token_id = matcher, vocab_size, eos_token_id
        self.lock = threading.Lock()
        try:
            self._first = Matcher(self, matcher, frozenset()).allowed()
            self._may_be_empty = eos_token_id in self._first.ids
        except ConstraintError as error:
            raise InputError(str(error)) from None

    def start(self, ends: frozenset[int] = frozenset()) -> Matcher:
        """See `Grammar.start`."""
        # Where a text may be empty, its own ends are among what may come first.
        first = None if ends and self._may_be_empty else self._first
        return Matcher(self, self._matcher.deep_copy(), ends, first)


class Matcher:
    """See `serving.sampling.constraints.TokenConstraint`."""

    def __init__(
        self, grammar: CompiledGrammar, matcher: Any, ends: frozenset[int], first: Allowed | None = None
    ) -> None:
        self._matcher, self._lock, self._vocab_size = matcher, grammar.lock, grammar.vocab_size
        self._eos, self._ends = grammar.eos_token_id, ends
        self._words = np.zeros(-(-self._vocab_size // 32), np.uint32)
        self._place = (self._words.ctypes.data, self._words.nbytes)
        self._allowed, self._error, self._count = first, "", 0
        self._pending: list[int] = []
        self.ready = first is not None
        self.done = self.slow = False

    def accept(self, token: int) -> None:
        """See `TokenConstraint.accept`."""
        self._allowed, self.ready = None, False
        self._pending.append(token)
        # The library waits for its own lock with the interpreter held; whoever has ours may have that one for long.
        if self._lock.acquire(blocking=False):
            try:
                self._catch_up()
            except BaseException as error:
                self._error = _reason(error)
            finally:
                self._lock.release()

    def compute(self) -> None:
        """See `TokenConstraint.compute`."""
        if self.ready:
            return
        try:
            with self._lock:
                self._catch_up()
                self._allowed = None if self.done or self._error else self._mask()
        except BaseException as error:
            self._error = _reason(error)
        self.ready = True

    def allowed(self) -> Allowed:
        """See `TokenConstraint.allowed`."""
        self.compute()
        if self._allowed is None or not self._allowed.count:
            raise ConstraintError(f"the grammar cannot go on after {self._count} tokens: {complaint(self._error)}")
        return self._allowed

    def _catch_up(self) -> None:
        """Have the library take the tokens that it has not seen."""
        for token in self._pending:
            self._count += 1
            if token in self._ends:
                token = self._eos
            if not self._matcher.consume_token(token):
                self._error = self._matcher.get_error() or "it does not allow the last one"
        self._pending.clear()
        self.done = not self._error and bool(self._matcher.is_stopped())

    def _mask(self) -> Allowed | None:
        self._matcher.unsafe_compute_mask_ptr(*self._place)
        if self._matcher.is_error():
            self._error = self._matcher.get_error()
            return None
        if self._ends and self._words[self._eos >> 5] >> np.uint32(self._eos & 31) & np.uint32(1):
            for end in self._ends:
                self._words[end >> 5] |= np.uint32(1 << (end & 31))
        return Allowed(self._words, self._vocab_size)
