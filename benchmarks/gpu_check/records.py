"""`results.jsonl`: every fact as one line, on the disk before the next is looked for.

A line is a JSON object with `stage`. What a stage found carries its `kind`; the line that ends a stage
carries `rc`, `seconds` and, where it did not end well, `why`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

OK, FAILED, CANNOT_RUN, TIMED_OUT = 0, 1, 3, 124


def append(file: Path, record: Record) -> None:
    """Adds a line and waits until the disk has it. One write: lines of several processes do not mix."""
    line = json.dumps(record, allow_nan=False, default=str) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(file: Path) -> list[Record]:
    """All lines; one that was broken off by a kill is left out."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "stage" in record:
            records.append(record)
    return records


def ends(records: list[Record]) -> dict[str, Record]:
    """By stage, the line that ended it."""
    return {record["stage"]: record for record in records if "rc" in record}


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record.get("kind") == kind]
