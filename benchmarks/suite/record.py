"""The record of a run: its schema, its rows, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serving.bundle import Bundle
from serving.bundle.manifest import MANIFEST_NAME
from serving.errors import InputError

SCHEMA = "gpt2-bundle-bench/2"


def about(bundle: Bundle) -> dict[str, str]:
    """Return what a record says of its bundle."""
    manifest = (bundle.folder / MANIFEST_NAME).read_bytes()
    return {"bundle": bundle.manifest.name, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}


def keep(record: Mapping[str, Any], path: Path) -> None:
    """Write a record that replaces the one at `path` as a whole, so that a kill leaves one of them."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def write_reports(record: Mapping[str, Any], path: Path) -> None:
    """Write the record to `path`, and its Markdown, CSV and HTML next to it."""
    from benchmarks.suite.report.html import to_page
    from benchmarks.suite.report.markdown import to_markdown
    from benchmarks.suite.report.tables import to_csv

    keep(record, path)
    path.with_suffix(".md").write_text(to_markdown(record), encoding="utf-8")
    path.with_suffix(".csv").write_text(to_csv(record), encoding="utf-8")
    path.with_suffix(".html").write_bytes(to_page(record))


def read_record(path: Path) -> dict[str, Any]:
    """Read a record of the suite. Raises InputError for anything else, and for a record that measured nothing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            schema = record.get("schema") if isinstance(record, dict) else None
            raise ValueError(f"its schema is {schema!r}, not {SCHEMA!r}" if schema else f"it has no schema {SCHEMA!r}")
        for point, row in record_rows(record):
            _ = point["schedule_sha256"], point["point"], dict(point["winners"]), row["target"], row["errors"]
            for values in row["figures"].values():
                if not all(value is None or isinstance(value, (int, float)) for value in values):
                    raise ValueError("a figure is not a number")
            if row["summary"] is not None:
                _ = row["summary"]["failed"]
        if not any(True for _ in record_rows(record)):
            raise ValueError("nothing was measured in it")
    except KeyError as error:
        raise InputError(f"{path}: not a whole record of 'gpt2-bundle bench' (it lacks {error})") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a record of 'gpt2-bundle bench' ({error})") from None
    found: dict[str, Any] = record
    return found


def record_rows(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Give each (point, row)."""
    for point in record["points"]:
        for row in point["rows"]:
            yield point, row
