"""Compiles grammars for the event loop: in threads of their own, within a time, with one compiler for each model."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

from serving.engine.api import Engine
from serving.errors import InputError, RuntimeMissingError
from serving.sampling.constraints import Grammar, StructuredOutput
from serving.sampling.grammars import GrammarCompiler, installed
from serving.server.errors import FieldError

COMPILE_SECONDS = 5.0
"""Within which a grammar must be compiled, its wait for others included."""
_STACK_BYTES = 64 << 20
_compilers: WeakKeyDictionary[Engine, GrammarCompiler] = WeakKeyDictionary()
_lock = threading.Lock()
log = logging.getLogger("gpt2_bundle.server")


def _yield_to_engines() -> None:
    """Let the threads that decode run before this one, where the system can tell threads apart."""
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        except OSError:
            log.debug("the priority of a thread cannot be lowered here")


_POOL = ThreadPoolExecutor(2, thread_name_prefix="grammars", initializer=_yield_to_engines)


def prepare(engine: Engine) -> None:
    """Make the compiler of `engine` now, if there can be one: that holds the interpreter for half a second."""
    if "grammar" in engine.unsupported or not installed():
        return
    try:
        _compiler(engine)
    except InputError as error:
        log.info("%s", error)


async def compile_grammar(engine: Engine, wanted: StructuredOutput, field: str) -> Grammar:
    """`wanted`, which `field` of a request asks for, compiled for `engine`. Raises FieldError."""
    if "grammar" in engine.unsupported:
        raise FieldError(f"{field} is not supported by this model's runtime; serve it with ONNX Runtime", field)
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(_POOL, lambda: _compiler(engine).compile(wanted))
    try:
        return await asyncio.wait_for(work, COMPILE_SECONDS)
    except TimeoutError:
        raise FieldError(f"{field} is too complex: it takes over {COMPILE_SECONDS:g} s to compile", field) from None
    except (InputError, RuntimeMissingError) as error:
        raise FieldError(f"{field}: {error}", field) from None


def _compiler(engine: Engine) -> GrammarCompiler:
    with _lock:
        if engine not in _compilers:
            _compilers[engine] = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_id)
        return _compilers[engine]
