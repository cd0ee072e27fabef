"""The documents of a corpus: from the paths of a recipe to a lazy stream of named texts."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder.data.chinese_sentences import read_chinese_sentences
from builder.data.docstrings import read_docstrings
from builder.data.documents import Document
from builder.data.file_readers import Skipped, kind_of, kinds, read_records
from builder.data.instructions import read_function_instructions, read_instructions
from builder.recipe import CorpusRecipe, InstructionRecipe
from serving.errors import InputError


@dataclass(frozen=True)
class SourceFile:
    """A file to read, the name its documents get, and whether the recipe named this very file."""

    path: Path
    name: str
    named: bool


@dataclass(frozen=True)
class Sources:
    """What given paths stand for: files in reading order, and how many were skipped, by their ending.

    `asked` is where the paths were given, which errors name.
    """

    files: tuple[SourceFile, ...]
    skipped: Mapping[str, int]
    asked: str = "corpus.paths"


def find_sources(paths: Sequence[str], asked: str = "corpus.paths") -> Sources:
    """Return the files that `paths` name (files, folders or globs): entries in their order, each entry's files sorted.

    A file that two entries reach is read once. In folders and globs, hidden files and unknown endings are skipped and
    counted, and in a folder .json files where there are texts of another kind. Raises InputError for a path that does
    not exist, a glob that matches nothing, a folder or glob without a readable file, and a file named directly whose
    kind is not read; `asked` says in it where the paths were given.
    """
    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    seen: set[Path] = set()
    for entry in paths:
        for source in _expand(entry, skipped, asked):
            real = source.path.resolve()
            if real not in seen:
                seen.add(real)
                files.append(source)
    return Sources(tuple(files), dict(sorted(skipped.items())), asked)


_PLAIN = InstructionRecipe()


def read_documents(
    recipe: CorpusRecipe, instruction: InstructionRecipe = _PLAIN, skipped: Skipped | None = None
) -> Iterator[Document]:
    """Yield every document of `recipe.paths`, lazily and in a fixed order; without paths, the builtin text.

    With an `instruction` that is set, records are read as `instructions.read_instructions` says.

    Raises InputError, in one sentence with the file and where in it, for whatever cannot be read; for a file named
    directly that holds no text; and, at the end, if no document had any.
    """
    if recipe.paths:
        yield from read_sources(find_sources(recipe.paths), recipe, instruction, skipped)
    elif instruction.is_set:
        yield from read_function_instructions(instruction)
    elif recipe.builtin == "chinese":
        yield from read_chinese_sentences()
    else:
        yield from read_docstrings()


def read_sources(
    sources: Sources,
    recipe: CorpusRecipe,
    instruction: InstructionRecipe = _PLAIN,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """Yield the documents of files already found; see `read_documents`. `skipped` counts the records left out."""
    skipped = Counter() if skipped is None else skipped
    any_content = False
    for source in sources.files:
        content, before = False, Counter(skipped)
        if source.path.stat().st_size == 0:
            if source.named:
                raise InputError(f"{source.path}: the file is empty; put text in it or leave it out of {sources.asked}")
            yield Document(source.name, "")
            continue
        for document in _records(source.path, recipe, instruction, skipped):
            content = content or bool(document.content.strip())
            yield replace(document, name=f"{source.name}:{document.name}" if document.name else source.name)
        if source.named and not content:
            others = ", ".join(f"{skipped[why] - before[why]} x {why}" for why in skipped if skipped[why] > before[why])
            raise InputError(
                f"{source.path}: no text in it, only {others or 'white space or no records'}; leave it out"
                + (" or name another field" if others else "")
            )
        any_content = any_content or content
    if not any_content:
        names = ", ".join(sorted({source.name for source in sources.files})[:3])
        found = f"{len(sources.files)} files ({names}) and no text in any"
        raise InputError(f"{sources.asked}: {found}; name files with text")


def _records(path: Path, recipe: CorpusRecipe, instruction: InstructionRecipe, skipped: Skipped) -> Iterator[Document]:
    if instruction.is_set:
        yield from read_instructions(path, recipe, instruction, skipped)
        return
    for record in read_records(path, recipe, skipped):
        yield Document(*record)


def _expand(entry: str, skipped: Counter[str], asked: str) -> list[SourceFile]:
    if not entry.strip():
        raise InputError(f"{asked} has an empty entry; name a file, a folder or a glob such as 'texts/*.txt'")
    path = Path(entry).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise InputError(f"{path}: this kind of file is not read; give one of {kinds()}")
        return [SourceFile(path, path.name, named=True)]
    if path.is_dir():
        # The folder's own name, also where it is given as "." or "..".
        folder = Path(os.path.abspath(path)).name  # noqa: PTH100 - resolve() would follow links.
        found = [(file, Path(folder) / file.relative_to(path)) for file in _walk(path)]
        return _readable(entry, "folder", found, skipped)
    if not glob.has_magic(entry):
        raise InputError(f"{path}: no such file or folder; check {asked}")
    matches = [Path(match) for match in glob.iglob(str(path), recursive=True)]  # noqa: PTH207 - Path.glob takes no absolute one
    if not matches:
        raise InputError(f"{entry}: the glob matches nothing; check {asked}")
    root = _fixed_part(path)
    inside = {file for match in matches for file in (_walk(match) if match.is_dir() else [match])}
    return _readable(entry, "glob", [(file, file.relative_to(root)) for file in inside], skipped)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file under a folder; hidden folders (.git and the like) are left alone."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files)


def _readable(entry: str, what: str, found: Sequence[tuple[Path, Path]], skipped: Counter[str]) -> list[SourceFile]:
    kept: list[SourceFile] = []
    endings: Counter[str] = Counter()
    for path, name in sorted(found, key=lambda pair: pair[1].parts):
        if path.name.startswith("."):
            endings["hidden"] += 1
        elif kind_of(path) is None or not path.is_file():
            endings[path.suffix.lower() or "no ending"] += 1
        else:
            kept.append(SourceFile(path, name.as_posix(), named=False))
    if what == "folder" and any(kind_of(source.path) != ".json" for source in kept):
        # Next to texts, .json files are most often settings.
        for source in [source for source in kept if kind_of(source.path) == ".json"]:
            kept.remove(source)
            endings[".json"] += 1
    if not kept:
        others = ", ".join(f"{count} x {ending}" for ending, count in sorted(endings.items())) or "nothing at all"
        raise InputError(f"{entry}: no readable file in this {what} (it has {others}); give one of {kinds()}")
    skipped.update(endings)
    return kept


def _fixed_part(pattern: Path) -> Path:
    """The leading folders of a glob that have no wildcard."""
    root = Path(pattern.anchor)
    for part in pattern.parts[len(root.parts) : -1]:
        if glob.has_magic(part):
            break
        root /= part
    return root
