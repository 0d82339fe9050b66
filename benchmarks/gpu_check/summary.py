"""What came out so far, as a page for a person: rewritten after every stage."""

from __future__ import annotations

from benchmarks.gpu_check.plan import STAGES
from benchmarks.gpu_check.records import Record, ends, of_kind

_RC = {0: "done", 3: "could not run", 124: "past its deadline"}


def summary(records: list[Record]) -> str:
    """Markdown: a row a stage, then the records that say that something is wrong."""
    ended = ends(records)
    rows = []
    for name, what in [("build", "the extension"), *((stage.name, stage.what) for stage in STAGES)]:
        end = ended.get(name)
        if end is None:
            continue
        found = sum(record["stage"] == name and "kind" in record for record in records)
        state = _RC.get(end["rc"], f"failed ({end['rc']})")
        rows.append(f"| {name} | {what} | {state} | {end['seconds']:.0f} | {found} | {end.get('why', '')} |")
    wrong = [
        f"- {record['stage']}: {record['name']}: {record.get('why', 'off by more than allowed')}"
        for record in records
        if record.get("right") is False
    ]
    failed = [f"- {r['name']}: {r['outcome']}" for r in of_kind(records, "test") if r["outcome"] != "passed"]
    text = ["| stage | what it finds out | how it ended | s | records | why |", "|---|---|---|---:|---:|---|"]
    text += [row.replace("\n", " ") for row in rows]
    if wrong:
        text += ["", "Wrong results:", "", *wrong]
    if failed:
        text += ["", "Tests that did not pass:", "", *failed]
    return "\n".join(text) + "\n"
