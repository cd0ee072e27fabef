"""Print what W&B's client wrote offline, a line of JSON a run: ID, parameters, figures by step, summary, artifacts.

A .wandb file is a log as LevelDB has it, in blocks of 32 KiB, whose records are W&B's own protocol buffers.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, held = 7, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + HEADER : place + HEADER + size]
        assert zlib.crc32(data[place + 6 : place + 7] + part) == int.from_bytes(data[place : place + 4], "little")
        place += HEADER + size
        held = part if kind in (FULL, FIRST) else held + part
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(held)
            yield record


def main() -> None:
    for path in sorted(Path(sys.argv[1]).glob("offline-run-*/*.wandb")):
        found: dict[str, object] = {"parameters": {}, "history": [], "summary": {}, "artifacts": []}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                found["parameters"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = record.history.item
                found["history"].append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
            elif kind == "summary":
                items = record.summary.update
                found["summary"] |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            elif kind == "artifact":
                entries = record.artifact.manifest.contents
                found["artifacts"].append(
                    {
                        "name": record.artifact.name,
                        "metadata": json.loads(record.artifact.metadata or "{}"),
                        "paths": sorted(entry.path for entry in entries),
                        "refs": sorted(entry.ref for entry in entries if entry.ref),
                    }
                )
            elif kind == "exit":
                found["exit_code"] = record.exit.exit_code
        print(json.dumps(found))


main()
