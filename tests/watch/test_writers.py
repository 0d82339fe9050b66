"""What is written is read back whole and in order, also behind a kill amid a write."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stream_r1.watch.writers import FolderWriter, TensorBoardWriter, read_metrics


def test_a_kill_amid_any_write_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Steps 1 and 2 are kept; the process dies after any byte of what it writes of step 3."""
    (tmp_path / "whole").mkdir()
    for file, make in (("metrics.csv", FolderWriter), (None, TensorBoardWriter)):
        first = make(tmp_path / "whole")
        sizes = []
        for step in (1, 2, 3):
            first.scalars(step, {"a": step / 3, "b": -step})
            (path,) = (tmp_path / "whole").glob(file or "events.*")
            sizes.append(path.stat().st_size)
        data = path.read_bytes()
        for size in range(sizes[1], sizes[2] + 1):
            out = tmp_path / f"{make.__name__}-{size}"
            out.mkdir()
            (out / path.name).write_bytes(data[:size])
            second = make(out, 2)
            for step in (3, 4):
                second.scalars(step, {"a": step / 3, "b": -step})
            if file:
                found = [(row["step"], row["a"], row["b"]) for row in read_metrics(out / file)]
            else:
                there = EventAccumulator(str(out)).Reload()
                points = zip(there.Scalars("a"), there.Scalars("b"), strict=True)
                found = [(a.step, a.value, b.value) for a, b in points]
            assert found == [(n, pytest.approx(n / 3), -n) for n in (1, 2, 3, 4)], size


def test_event_files_are_read_in_their_order_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    clock = [now] * 12 + [now - 3600] * 3 + [now + 3600]
    for done, seconds in enumerate(clock):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
        TensorBoardWriter(tmp_path, done).scalars(done + 1, {"x": done})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("x")
    assert [(e.step, e.value) for e in found] == [(done + 1, done) for done in range(len(clock))]


def test_numbers_survive_the_csv(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path)
    rows = [
        {"a": 1 / 3, "b": -1e-300},
        {"a": float("nan")},
        {"c, d": float("inf"), "a": 2.0**70},
    ]
    for step, row in enumerate(rows, 1):
        writer.scalars(step, row)
    found = list(read_metrics(tmp_path / "metrics.csv"))
    assert repr([{"step": step, **row} for step, row in enumerate(rows, 1)]) == repr(
        [{key: row[key] for key in ("step", *rows[i])} for i, row in enumerate(found)]
    )
    assert (tmp_path / "metrics.csv").read_text().startswith('step,a,b,"c, d"\n')
