"""The process that renders one chat template: jinja2's sandbox under limits of the operating system.

Jinja's sandbox keeps a template from attributes that lead out of it. It bounds neither time nor memory, and a single
expression such as `10 ** 10 ** 8` holds a whole interpreter. So a template runs here, with limits on processor time
and memory, without files, other processes or the server's environment. The parent ends the process that goes over.

Messages on standard input, a socket, are JSON with a length before each. This file imports nothing of the project,
and runs as a program.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import json
import os
import random
import signal
import struct
import sys
import time
from datetime import datetime
from typing import Any

MAX_TEXT = 1 << 20
"""Characters of a rendered text."""
MAX_MEMORY = 512 << 20
"""Bytes of address space, the interpreter's own included."""
MAX_MESSAGE = 500
"""Characters of a template's own sentence."""
COMPILE_SECONDS = 1.0
RENDER_SECONDS = 0.25
"""Of processor time."""
LENGTH = struct.Struct(">I")
# A final message that is to be continued ends in this. The blank shows whether the template trims texts.
_CONTINUED = "\ue000continued\ue001"


class Refused(Exception):
    """The template's result cannot be used; a sentence."""


def limit() -> None:
    """Give up whatever a template needs not: memory, files, processes, a place before others on the processor."""
    import resource

    # Loaded now, since no file can be opened later: also what jinja2 imports only when it is needed.
    for name in ("jinja2.constants", "jinja2.debug", "jinja2.ext", "jinja2.sandbox", "pprint", "random", "textwrap"):
        importlib.import_module(name)
    codecs.lookup("unicode-escape")

    time.localtime()
    os.nice(5)
    bounds = {
        resource.RLIMIT_AS: MAX_MEMORY,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 3,
    }
    for kind, most in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # The system may already allow less.
            resource.setrlimit(kind, (most, most))


@contextlib.contextmanager
def processor_time(seconds: float) -> Any:
    """End this process, also inside of C code, if the block takes more processor time than `seconds`."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Renderer:
    """One compiled template, with the settings that transformers compiles it with."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["namespace"] = _namespace_type()
        # A function, as a class has methods that lead elsewhere.
        environment.globals["dict"] = lambda *args, **values: dict(*args, **values)
        self._template = environment.from_string(source)
        self._special = special
        tree = environment.parse(source)
        loops = [loop.iter for loop in tree.find_all(nodes.For)]
        assigned = [node.target for node in tree.find_all(nodes.Assign) if _is_content(node.node)]
        names = {target.name for target in assigned if isinstance(target, nodes.Name)}
        self._loops = any(_is_content(each) or getattr(each, "name", None) in names for each in loops)
        self._tests = any(test.name == "string" for test in tree.find_all(nodes.Test))

    def render(self, job: dict[str, Any]) -> str:
        """The text of the job's `messages`. Raises Refused, and whatever the template raises."""
        messages = [{**message, "content": self._content(message["content"])} for message in job["messages"]]
        if job["continue_final_message"]:
            messages[-1]["content"] = _marked(messages[-1]["content"])
        values = {
            **self._special,
            "tools": None,
            "documents": None,
            **job["kwargs"],
            "messages": messages,
            "add_generation_prompt": job["add_generation_prompt"],
        }
        parts, size = [], 0
        for part in self._template.generate(**values):
            parts.append(part)
            size += len(part)
            if size > MAX_TEXT:
                raise Refused(f"makes more than {MAX_TEXT} characters of these messages")
        text = "".join(parts)
        return _continued(text) if job["continue_final_message"] else text

    def _content(self, content: str | list[str]) -> Any:
        """A text as this template reads it: in parts if it came so, and only if the template knows parts."""
        if isinstance(content, str):
            return [_part(content)] if self._loops and not self._tests else content
        return [_part(text) for text in content] if self._loops or self._tests else "\n".join(content)


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _is_content(node: Any) -> bool:
    """Whether a node is `message.content` or `message['content']`."""
    return getattr(node, "attr", None) == "content" or getattr(getattr(node, "arg", None), "value", None) == "content"


def _marked(content: Any) -> Any:
    if isinstance(content, str):
        return f"{content}{_CONTINUED} "
    return [*content[:-1], _part(f"{content[-1]['text']}{_CONTINUED} ")]


def _continued(text: str) -> str:
    """`text` up to the end of its final message, without the blanks behind it where the template trims them."""
    before, mark, after = text.rpartition(_CONTINUED)
    if not mark:
        raise Refused("leaves the final message out, so it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where jinja2's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _namespace_type() -> Any:
    """jinja2's namespace without names that Python gives a meaning to."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class Plain(Namespace):
        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            found = dict(*rest, **values)
            for name in found:
                check(name)
            Namespace.__init__(self, found)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    def check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no name that begins with an underscore, such as {name!r}")

    return Plain


def _generation_tag() -> Any:
    """The tag {% generation %}, with which training marks what the model says. It changes no text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> Any:
            return caller()

    return Generation


def attempt(seconds: float, work: Any) -> dict[str, Any]:
    """What `work` gives as {"value": ...}, or a sentence as {"error": ...}; "fatal" asks for another process."""
    try:
        with processor_time(seconds):
            try:
                return {"value": work()}
            except BaseException as error:
                return _failure(error)
    except MemoryError as error:
        return _failure(error)


def _failure(error: BaseException) -> dict[str, Any]:
    import jinja2

    if isinstance(error, Refused):
        return {"error": str(error)}
    if isinstance(error, MemoryError):
        return {"error": f"takes more than {MAX_MEMORY >> 20} MiB of memory", "fatal": True}
    if isinstance(error, RecursionError):
        return {"error": "calls itself without end", "fatal": True}
    said = str(error)[:MAX_MESSAGE]
    if type(error) is jinja2.TemplateError:
        return {"error": f"refuses these messages: {said}"}
    line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return {"error": f"fails{line}: {said or type(error).__name__}"}


def receive() -> Any:
    """The next message; None at the end."""
    head = sys.stdin.buffer.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(sys.stdin.buffer.read(*LENGTH.unpack(head)))


def send(message: dict[str, Any]) -> None:
    """Give the parent a message."""
    # A template can make halves of surrogate pairs, which are no text.
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    view = memoryview(LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    """Compile the first message's template, then render each further message."""
    start = receive()
    if start is None:
        return
    try:
        limit()
    except ModuleNotFoundError:
        send({"missing": True})
        return
    random.seed()
    made: list[Renderer] = []
    send(attempt(COMPILE_SECONDS, lambda: made.append(Renderer(start["template"], start["special"]))))
    while made and (job := receive()) is not None:
        send(attempt(RENDER_SECONDS, lambda job=job: made[0].render(job)))


if __name__ == "__main__":
    main()
