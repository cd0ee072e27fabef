"""The corpus that is on every machine: the docstrings of the running Python's standard library.

One document a docstring, because each is a text that starts and ends by itself; a module's docstrings joined would
teach a model jumps between subjects that nobody writes. Nothing is imported: the sources are parsed only.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from builder.data.documents import Document
from serving.errors import InputError

Found = tuple[str, ast.AST, str]

_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib-dynload",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "_bundled",
    }
)


def read_docstrings(library: Path | None = None) -> Iterator[Document]:
    """Yield each docstring (module, class, function) under `library` as one document named by its qualified name.

    `library` is the running Python's standard library unless given. Files come sorted by path, docstrings in source
    order, their indentation cleaned as `inspect.cleandoc` does. Test folders, installed packages and files that do not
    parse are left out. Raises InputError if there is no docstring at all, as in a Python shipped without its sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    empty = True
    for path in source_files(root):
        for name, _, text in _docstrings(path, root):
            empty = False
            yield Document(name, text)
    if empty:
        raise InputError(
            f"{root}: no docstrings here, so this Python came without its library's sources; "
            "set corpus.paths to texts of your own"
        )


def read_functions(library: Path | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, signature, docstring) of each function that `read_docstrings` finds.

    The signature is the `def` line with its annotations, on one line and without decorators.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    for path in source_files(root):
        for name, node, text in _docstrings(path, root):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                yield name, f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:", text


def source_files(root: Path) -> list[Path]:
    """Return the sources under `root` that `read_docstrings` reads, sorted by path."""
    found: list[Path] = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        found.extend(Path(parent, name) for name in files if name.endswith(".py"))
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _docstrings(path: Path, root: Path) -> Iterator[Found]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    yield from _walk(tree, ".".join(parts))


def _walk(node: ast.AST, name: str) -> Iterator[Found]:
    """The docstrings, with name and node, of a node and of all that is defined inside it, in source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and _encodable(text):
            yield name, node, text
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) else ""
        if inner or isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _walk(child, f"{name}.{inner}" if inner else name)


def _encodable(text: str) -> bool:
    """False for a literal with half a surrogate pair, which no UTF-8 file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
