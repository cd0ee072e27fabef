"""The manifest: what a bundle says about itself, as frozen dataclasses that read from and write to `manifest.json`.

Standard library only. `from_json` accepts nothing that this schema does not name, so a manifest that opens is a
manifest that means what it says; docs/format.md is the same contract in words.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from serving.bundle.strict_json import Check, join, loads, read, refuse, shown
from serving.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
DType = Literal["bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64", "string"]
MAX_PATH_BYTES = 1024
MAX_FILE_BYTES = 2**63 - 1
MAX_ARTIFACTS = 10_000
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z\Z", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
NAME_PROBLEM = "must be 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit"
_GRAPH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")


def _between(low: int, high: int) -> Check:
    return lambda value: None if low <= value <= high else f"must be {low} to {high}"


def _matches(pattern: re.Pattern[str], problem: str) -> Check:
    return lambda value: None if pattern.match(value) else problem


_count = _between(1, 2**31 - 1)
_token_id = _between(0, 2**31 - 1)
_sha256 = _matches(_SHA256, "must be 64 lower-case hexadecimal digits")


def path_problem(path: str) -> str | None:
    """What is wrong with `path` as a bundle's relative POSIX path, as "must ...", or None if nothing is."""
    if not path or path.startswith("/") or ":" in path or "\\" in path:
        return "must be a relative path with '/' between its parts and no ':' or backslash"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "must have no empty part, '.' or '..'"
    if not path.isprintable() or len(path.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        return f"must be printable text of at most {MAX_PATH_BYTES} bytes"
    return None


def _created(value: str) -> str | None:
    problem = "must be a UTC time such as '2025-01-31T12:00:00Z'"
    if not _CREATED.match(value):
        return problem
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return problem
    return None


def _shape(value: tuple[int | str, ...]) -> str | None:
    if all((0 <= size < 2**31) if isinstance(size, int) else (size and size.isprintable()) for size in value):
        return None
    return "must hold sizes of at least 0 or names of sizes"


@dataclass(frozen=True)
class Geometry:
    """The sizes of a GPT-2, with the key names of Hugging Face's `config.json`."""

    vocab_size: Annotated[int, _count]
    n_positions: Annotated[int, _count]
    n_embd: Annotated[int, _count]
    n_layer: Annotated[int, _count]
    n_head: Annotated[int, _count]
    n_inner: Annotated[int, _count]
    layer_norm_epsilon: Annotated[float, lambda value: None if 0 < value < 1 else "must lie between 0 and 1"]
    activation_function: Literal["gelu_new", "gelu", "relu"]
    bos_token_id: Annotated[int, _token_id]
    eos_token_id: Annotated[int, _token_id]

    @property
    def head_dim(self) -> int:
        """Width of one attention head: n_embd / n_head."""
        return self.n_embd // self.n_head

    @property
    def padded_head_dim(self) -> int:
        """Width of a head in a shared cache buffer: the next multiple of 8, which GroupQueryAttention takes alone."""
        return -(-self.head_dim // 8) * 8

    @property
    def parameters(self) -> int:
        """Number of weights, the LM head tied to the token embeddings (Radford et al., 2019, and their released code):
        the two embeddings; per block two norms, the fused attention projection, its output and the two layers of the
        MLP; the final norm.
        """
        embd, inner = self.n_embd, self.n_inner
        block = 4 * embd + (embd + 1) * 3 * embd + (embd + 1) * embd + (embd + 1) * inner + (inner + 1) * embd
        return (self.vocab_size + self.n_positions) * embd + self.n_layer * block + 2 * embd


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of one input or output; a name in the shape is a size that the caller chooses."""

    dtype: DType
    shape: Annotated[tuple[int | str, ...], _shape]


@dataclass(frozen=True)
class Graph:
    """One runnable graph of the bundle and how to feed it.

    `path` is its main file: the `.onnx` file, or `saved_model.pb` of a SavedModel. `padding` is where a ragged batch
    may be padded. `cache` is how keys and values come and go: "concatenated" (past in, longer present out),
    "shared-buffer" (past and present are one buffer of full length), "static" (inside the graph) or "none".
    `signature` names the SavedModel signature, for TensorFlow only.
    """

    runtime: Literal["onnx", "tensorflow"]
    path: Annotated[str, path_problem]
    precision: Precision
    padding: Literal["any", "right"]
    cache: Literal["concatenated", "shared-buffer", "static", "none"]
    inputs: Annotated[dict[str, TensorSpec], lambda value: None if value else "must name at least one tensor"]
    outputs: Annotated[dict[str, TensorSpec], lambda value: None if value else "must name at least one tensor"]
    signature: str | None = None

    def cache_head_dim(self, model: Geometry) -> int:
        """Width of a head in this graph's KV cache."""
        return model.padded_head_dim if self.cache == "shared-buffer" else model.head_dim


@dataclass(frozen=True)
class Artifact:
    """One file: its path inside the bundle, its size in bytes and its SHA-256 in hexadecimal."""

    path: Annotated[str, path_problem]
    size: Annotated[int, _between(0, MAX_FILE_BYTES)]
    sha256: Annotated[str, _sha256]


@dataclass(frozen=True)
class TokenizerFiles:
    """`id` is "sha256:" and the hash of tokenizer.json; `files` are all files that describe the tokenizer."""

    id: Annotated[str, _matches(re.compile(r"sha256:[0-9a-f]{64}\Z"), "must be 'sha256:' and 64 hexadecimal digits")]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """What the bundle was made from: the recipe as a table, the corpus, package versions by name, and the seed."""

    recipe: dict[str, Any]
    corpus_sha256: Annotated[str, _sha256]
    versions: dict[str, str]
    seed: Annotated[int, _between(0, 2**63 - 1)]


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`. `quality` holds figures by name; `parity` sums up verification.json."""

    schema_version: int
    name: Annotated[str, _matches(NAME, NAME_PROBLEM)]
    created: Annotated[str, _created]
    model: Geometry
    tokenizer: TokenizerFiles
    artifacts: tuple[Artifact, ...]
    graphs: dict[str, Graph]
    provenance: Provenance
    quality: dict[str, float]
    parity: dict[str, Any]

    @property
    def total_size(self) -> int:
        """Bytes of all artifacts; manifest.json itself is not one."""
        return sum(artifact.size for artifact in self.artifacts)


def to_json(manifest: Manifest) -> str:
    """The manifest as the text of `manifest.json`: two spaces of indent, UTF-8, one newline at the end.

    Raises BundleError for a value that JSON has no form for, such as NaN or a path object.
    """
    table = dataclasses.asdict(manifest)
    for graph in table["graphs"].values():
        if graph["signature"] is None:
            del graph["signature"]
    try:
        return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest of {manifest.name!r} cannot be written as JSON: {error}") from None


def from_json(data: bytes | str, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and check the text of a manifest; `where` names the file in errors.

    Raises BundleError, with the full path of the key, for anything that is not exactly schema 1: an unknown, missing
    or doubled key, a wrong type, a value out of range, a path that could leave the folder, two paths that would be one
    file on a case-insensitive disk, or a graph or tokenizer file that is not an artifact.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    value = loads(data, where)
    version = value.get("schema_version", SCHEMA_VERSION) if isinstance(value, dict) else SCHEMA_VERSION
    if type(version) is not int or version != SCHEMA_VERSION:
        newer = type(version) is int and version > SCHEMA_VERSION
        advice = (
            "install a newer gpt2-bundle" if newer else "build the bundle again, or install the version that wrote it"
        )
        raise BundleError(
            f"{where}: schema_version is {shown(version)} but this version of gpt2-bundle reads {SCHEMA_VERSION}; "
            + advice
        )
    manifest = read(Manifest, value, where)
    for problem in (_geometry_problem(manifest.model), _artifact_problem(manifest), _graph_problem(manifest)):
        if problem:
            raise refuse(where, problem)
    return manifest


def _geometry_problem(model: Geometry) -> str | None:
    if model.n_embd % model.n_head:
        return f"model.n_embd is {model.n_embd}, which model.n_head {model.n_head} does not divide"
    for key in ("bos_token_id", "eos_token_id"):
        if getattr(model, key) >= model.vocab_size:
            return f"model.{key} is {getattr(model, key)} but model.vocab_size is {model.vocab_size}"
    return None


def _artifact_problem(manifest: Manifest) -> str | None:
    seen: dict[str, str] = {}
    for artifact in manifest.artifacts:
        folded = unicodedata.normalize("NFC", artifact.path).casefold()
        if folded == MANIFEST_NAME:
            return f"artifacts names {artifact.path!r}, which cannot hold its own hash"
        if seen.get(folded) == artifact.path:
            return f"artifacts names {artifact.path!r} twice"
        if folded in seen:
            return f"artifacts {seen[folded]!r} and {artifact.path!r} differ only in case"
        seen[folded] = artifact.path
    by_path = {artifact.path: artifact for artifact in manifest.artifacts}
    for path in (TOKENIZER_NAME, *manifest.tokenizer.files):
        if path not in by_path:
            return f"tokenizer file {path!r} is not an artifact"
    if TOKENIZER_NAME not in manifest.tokenizer.files:
        return f"tokenizer.files does not name {TOKENIZER_NAME!r}"
    if manifest.tokenizer.id != f"sha256:{by_path[TOKENIZER_NAME].sha256}":
        return f"tokenizer.id is not the hash of the artifact {TOKENIZER_NAME!r}"
    return None


def _graph_problem(manifest: Manifest) -> str | None:
    paths = {artifact.path for artifact in manifest.artifacts}
    for name, graph in manifest.graphs.items():
        where = join("graphs", name)
        if not _GRAPH_NAME.match(name):
            return f"{where} must be named FOLDER/VARIANT, such as 'ort/fp32'"
        if graph.path not in paths:
            return f"{where}.path {graph.path!r} is not an artifact"
        if (graph.runtime == "tensorflow") != bool(graph.signature):
            return f"{where}.signature must be given for the runtime 'tensorflow' and for no other"
    return None
