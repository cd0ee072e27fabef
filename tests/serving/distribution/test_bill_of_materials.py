"""`gpt2-bundle sbom`: valid by CycloneDX's own schema, true to the manifest, and changed by every changed byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import Provenance, open_bundle, write_manifest
from serving.cli import run
from tests.closed_form import geometry, graphs, write_bundle
from tests.tiny_build import Fails, contents

PROVENANCE = {"corpus_sha256": "ab" * 32, "versions": {"python": "3.12.1", "keras": "3.15.1"}, "seed": 7}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return described(tmp_path / "tiny", {})


def described(folder: Path, recipe: dict[str, Any], **provenance: Any) -> Path:
    """A bundle with this recipe."""
    write_bundle(folder, extra={"README.md": b"# tiny\n", "onnx/\u4f60 \u597d.txt": b"x"})
    write_manifest(
        folder,
        name="tiny",
        model=geometry(),
        graphs=graphs(),
        provenance=Provenance(recipe=recipe, **(PROVENANCE | provenance)),
        quality={"validation_perplexity": 3.25, "validation_tokens": 1000.0},
        parity={},
        created="2025-01-31T12:00:00Z",
    )
    return folder


def written(folder: Path, tmp_path: Path) -> dict[str, Any]:
    assert run(["sbom", str(folder), "--output", str(tmp_path / "out.cdx.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out.cdx.json").read_bytes())
    return found


def validate(document: dict[str, Any]) -> str | None:
    """What CycloneDX's strict schema, as its own library ships it, has against a document."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))
    return None if problem is None else str(problem)


RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "scratch": {
        "model": {"base": ""}, "training": {"epochs": 4.0}, "corpus": {"paths": [], "builtin": "docstrings"},
        "instruction": {"prompt_field": ""},
    },
    "chat": {
        "model": {"base": "openai-community/gpt2"}, "training": {"epochs": 1.0},
        "corpus": {"paths": ["/srv/notes", "b.jsonl"], "builtin": "docstrings"},
        "instruction": {"prompt_field": "", "messages_field": "messages"},
    },
    "as it is": {"model": {"base": "/srv/gpt2/"}, "training": {"epochs": 0}, "corpus": {"paths": []}},
    "odd": {"model": 7, "training": [], "corpus": "x", "instruction": None},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_valid(tmp_path: Path, recipe: str) -> None:
    document = written(described(tmp_path / "tiny", RECIPES[recipe]), tmp_path)
    assert validate(document) is None
    document["components"][0]["type"] = "nonsense"
    assert validate(document) is not None


def test_it_says_what_the_manifest_says(tmp_path: Path) -> None:
    folder = described(tmp_path / "tiny", RECIPES["chat"])
    document, manifest = written(folder, tmp_path), open_bundle(folder).manifest
    files = {each["name"]: each["hashes"][0]["content"] for each in document["components"] if each["type"] == "file"}
    assert files == {artifact.path: artifact.sha256 for artifact in manifest.artifacts}
    packages = {each["purl"] for each in document["components"] if "purl" in each}
    assert packages == {"pkg:generic/python@3.12.1", "pkg:pypi/keras@3.15.1"}
    model = document["metadata"]["component"]
    assert model["name"] == "tiny" and document["metadata"]["timestamp"] == manifest.created
    assert [each["name"] for each in model["pedigree"]["ancestors"]] == ["openai-community/gpt2"]
    card = model["modelCard"]
    assert card["modelParameters"]["approach"] == {"type": "supervised"}
    metrics = {each["type"]: float(each["value"]) for each in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics == manifest.quality
    (corpus,) = (each for each in document["components"] if each["type"] == "data")
    assert card["modelParameters"]["datasets"] == [{"ref": corpus["bom-ref"]}]
    assert corpus["name"] == "notes, b.jsonl" and corpus["hashes"][0]["content"] == "ab" * 32
    # No license is recorded in a manifest, and no path of the machine that built the bundle leaves it.
    text = json.dumps(document)
    assert '"licenses"' not in text and "/srv" not in text


def test_weights_as_they_are_name_their_base_and_no_corpus(tmp_path: Path) -> None:
    document = written(described(tmp_path / "tiny", RECIPES["as it is"]), tmp_path)
    assert document["metadata"]["component"]["pedigree"]["ancestors"][0]["name"] == "gpt2"
    assert not [each for each in document["components"] if each["type"] == "data"]
    assert "datasets" not in document["metadata"]["component"]["modelCard"]["modelParameters"]


def test_the_same_bundle_gives_the_same_bytes(bundle: Path, tmp_path: Path, capfdbinary: Any) -> None:
    assert run(["sbom", str(bundle)]) == 0
    first = capfdbinary.readouterr().out
    assert run(["sbom", str(bundle), "--output", str(tmp_path / "tiny.cdx.json")]) == 0
    assert (tmp_path / "tiny.cdx.json").read_bytes() == first
    assert not list(tmp_path.glob(".tiny.cdx*"))


def test_a_flipped_byte_fails_the_check(bundle: Path, tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "tiny.cdx.json"
    check = ["sbom", str(bundle), "--check", str(path)]
    assert run(["sbom", str(bundle), "--output", str(path)]) == 0 and run(check) == 0
    data = path.read_bytes()
    for at in range(0, len(data), len(data) // 30):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        fails(check, 1, "is not what gpt2-bundle", "one was changed")
    path.write_bytes(data)
    (bundle / "README.md").write_bytes(b"# Tiny\n")
    fails(check, 1, "'README.md' has changed")


def test_another_manifest_is_another_document(bundle: Path, tmp_path: Path) -> None:
    first = written(bundle, tmp_path)
    second = written(described(tmp_path / "second", {}, seed=8), tmp_path)
    assert first["serialNumber"] != second["serialNumber"]


def test_it_stays_outside_the_bundle(bundle: Path, fails: Fails) -> None:
    before = contents(bundle)
    fails(["sbom", str(bundle), "--output", str(bundle / "a.json")], 2, "lies inside")
    assert contents(bundle) == before
    fails(
        ["sbom", str(bundle), "--output", "a.json", "--check", str(bundle / "README.md")], 2, "--check writes nothing"
    )
