"""Checkpoints that several processes write together: resumed, moved to other numbers of them, broken off."""

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from workers import (
    Processes,
    distiller,
    everything,
    joined,
    launch,
    settings,
    train,
    train_alone,
    train_and_note,
)

from stream_r1.distill.checkpoint_files import list_checkpoints
from stream_r1.distill.verification import CheckpointError

SHARDED = {"shard": "full"}


def assert_equal(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0
) -> None:
    """Bit for bit, or to a tolerance relative to a tensor's largest number."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if tolerance and value.is_floating_point():
            atol = tolerance * value.abs().max().item() + 1e-8  # some gradients are zero but for rounding
            torch.testing.assert_close(got[key], value, rtol=tolerance, atol=atol, msg=key)
        else:
            assert torch.equal(got[key], value), key


@pytest.mark.parametrize("distributed", [{}, SHARDED | {"async_checkpoints": True}], ids=["whole", "sharded"])
def test_a_resumed_run_is_the_unbroken_run(distributed: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit on as many processes; up to the order of sums on one and on four."""
    chosen = settings(distributed=distributed, checkpoint_every=2)
    unbroken = launch(2, train, None, chosen)[0]
    before = launch(2, train, tmp_path, chosen.model_copy(update={"steps": 3}))[0][0]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    copy = tmp_path / "copy"
    copy.mkdir()
    (tmp_path / "step-00000003").rename(copy / "step-00000003")

    alone = train_alone(copy, chosen)  # leaves step-00000004.safetensors
    assert alone[0] == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in unbroken[0][3:]]
    assert_equal(alone[1], unbroken[1], 1e-5)
    assert [p.name for p in list_checkpoints(copy)] == ["step-00000003", "step-00000004.safetensors"]
    (copy / "step-00000004.safetensors").unlink()

    again = launch(2, train, copy, chosen)[0]
    assert before + again[0] == unbroken[0]
    assert_equal(again[1], unbroken[1])

    other = settings(distributed=SHARDED if not distributed else {})
    moved = launch(4, train, tmp_path, other)[0]  # from step 2
    assert moved[0] == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in unbroken[0][2:]]
    assert_equal(moved[1], unbroken[1], 1e-5)


def _save_twice(folder: Path, chosen: Any) -> list[int]:
    with joined(chosen) as ranks:
        run = distiller(ranks, folder, chosen)
        written = []
        for _ in range(2):
            path = run.save()
            written.append((path / "values.json").stat().st_mtime_ns)
        run.train_step()
        run.state.step -= 1  # another state of the same step takes its place
        path = run.save()
        return [*written, (path / "values.json").stat().st_mtime_ns]


def test_the_same_state_is_written_once(tmp_path: Path) -> None:
    first, second, third = launch(2, _save_twice, tmp_path, settings())[0]
    assert first == second < third
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["step-00000000"]


def test_one_process_s_file_goes_on_in_parts_on_two(tmp_path: Path) -> None:
    chosen = settings(distributed=SHARDED)
    unbroken = train_alone(None, chosen)
    train_alone(tmp_path, chosen.model_copy(update={"steps": 2}))
    moved = launch(2, train, tmp_path, chosen)[0]
    assert moved[0] == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in unbroken[0][2:]]
    assert_equal(moved[1], unbroken[1], 1e-5)


@pytest.mark.parametrize(
    ("size", "distributed"),
    [(2, SHARDED | {"async_checkpoints": True}), (2, {}), (None, {})],
    ids=["sharded-async", "whole", "alone"],
)
def test_killed_at_any_moment_a_run_loses_no_more_than_since_the_last_checkpoint(
    size: int | None, distributed: dict[str, Any], tmp_path: Path
) -> None:
    """Processes are killed with -9 amid steps, writing and removing; the run ends as the unbroken one."""
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    chosen = settings(steps=400, checkpoint_every=2, distributed=distributed)
    waiting = 2 if chosen.distributed.async_checkpoints else 1  # one may be under way
    moments = random.Random(str(distributed))
    for _ in range(2):
        noted = len(_notes(log))
        run = Processes(size, train_and_note, folder, chosen, log)
        _wait(lambda noted=noted: len(_notes(log)) >= noted + 6, run)
        time.sleep(moments.uniform(0, 0.3))
        run.kill()
        saved = [step for what, step in _notes(log) if what == "saved"]
        newest = int(list_checkpoints(folder)[-1].name[5:13])
        assert newest >= saved[-1]
        assert _notes(log)[-1][1] - newest <= waiting * chosen.checkpoint_every
    end = newest + 1
    finished = launch(size, train, folder, chosen.model_copy(update={"steps": end}))[0]
    unbroken = launch(size, train, None, chosen.model_copy(update={"steps": end}))[0]
    assert finished[0] == unbroken[0][-1:]
    assert_equal(finished[1], unbroken[1])
    assert not list(folder.glob(".*"))


def _diverge(folder: Path, chosen: Any) -> None:
    with joined(chosen) as ranks:
        run = distiller(ranks, folder, chosen)
        for event in run.run():
            if event.step == 2 and ranks.rank == 1:
                run.teacher.register_forward_hook(lambda *call: (call[-1][0] * float("nan"),))


@pytest.mark.parametrize("distributed", [{}, SHARDED], ids=["whole", "sharded"])
def test_a_run_that_diverges_completes_the_checkpoint_under_way(
    distributed: dict[str, Any], tmp_path: Path
) -> None:
    distributed = distributed | {"async_checkpoints": True}
    chosen = settings(critic_updates=1, max_skipped=0, checkpoint_every=2, distributed=distributed)
    results = Processes(2, _diverge, tmp_path, chosen).results()
    assert sum("an update of the student was not finite, at step 3" in str(r) for r in results) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    resumed = distiller(None, tmp_path, chosen)
    resumed.resume()
    assert all(t.isfinite().all() for t in everything(resumed).values())


def _notes(log: Path) -> list[tuple[str, int]]:
    if not log.exists():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [(line.split()[0], int(line.split()[1])) for line in lines if line.endswith("\n")]


def _wait(condition: Any, run: Processes) -> None:
    while not condition():
        assert all(process.is_alive() for process in run.processes)
        time.sleep(0.05)


def rewritten(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """A file of a folder with another header, as long as it was; what the folder says of it is put right."""
    with safe_open(path, "pt") as file:
        told = dict(file.metadata())
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(told)
    save_file(tensors, path, metadata=told)
    values = json.loads((path.parent / "values.json").read_text())
    values["files"][path.name] = path.stat().st_size
    (path.parent / "values.json").write_text(json.dumps(values))


def moved(told: dict[str, str]) -> None:
    places = json.loads(told["DCP_SHARDING_INFO"])
    name = next(name for name in places if len(places[name]["saved_offsets"]) == 2)
    places[name]["saved_offsets"][0] += 1
    told["DCP_SHARDING_INFO"] = json.dumps(places)


def changed(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads((path / "values.json").read_text())
    edit(content)
    (path / "values.json").write_text(json.dumps(content))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {  # of the folder, one of its files
    "cut": (lambda path, file: file.write_bytes(file.read_bytes()[:-8]), "{file}: expected .* bytes, got"),
    "gone": (lambda path, file: file.unlink(), "1 missing: {file}"),
    "one too many": (lambda path, file: (path / "x.safetensors").touch(), "x.safetensors"),
    "a header that lies": (
        lambda path, file: file.write_bytes(b"\xff" * 7 + b"\x00" + file.read_bytes()[8:]),
        "{file}: .*header",
    ),
    "a bit": (lambda path, file: flipped(file), "numbers"),
    "a piece elsewhere": (lambda path, file: rewritten(file, moved), "pieces|numbers"),
    "no values": (lambda path, file: (path / "values.json").unlink(), "values.json"),
    "broken values": (lambda path, file: (path / "values.json").write_text("{{"), "values.json.*JSON"),
    "a list of values": (lambda path, file: (path / "values.json").write_text("[1]"), "values.json.*1"),
    "a file of another folder": (
        lambda path, file: changed(path, lambda told: told["files"].update({"../x.safetensors": 0})),
        r"\.\./x\.safetensors",
    ),
    "another step": (lambda path, file: changed(path, lambda t: t["values"].update(step=7)), "step.*got 7"),
    "of torch": (
        lambda path, file: (shutil.rmtree(path), path.mkdir(), (path / ".metadata").write_bytes(b"cos\n.")),
        "values.json",
    ),
}


def _resume_each(folders: list[Path], chosen: Any) -> list[tuple[str, list[str], list[str]]]:
    """What each resume took, gave as reasons, and left in the folder."""
    with joined(chosen) as ranks:
        found = []
        for folder in folders:
            run = distiller(ranks, folder, chosen)
            path = run.resume()
            assert path is not None
            kept = sorted(file.name for file in folder.iterdir())
            found.append((path.name, [event.reason for event in run.checkpoints.set_aside], kept))
            ranks.barrier()
        return found


def test_the_one_before_a_damaged_one_is_used_on_all_ranks(tmp_path: Path) -> None:
    chosen = settings(steps=2, checkpoint_every=1, distributed=SHARDED)
    launch(2, train, tmp_path / "run", chosen, False)
    folders = [tmp_path / str(number) for number in range(len(DAMAGES))]
    for folder, (damage, _) in zip(folders, DAMAGES.values(), strict=True):
        shutil.copytree(tmp_path / "run", folder)
        damage(folder / "step-00000002", sorted((folder / "step-00000002").glob("*.safetensors"))[0])
    first, second = launch(2, _resume_each, folders, chosen)
    assert first == second
    name = sorted((tmp_path / "run" / "step-00000002").glob("*.safetensors"))[0].name
    for (path, reasons, kept), (what, (_, told)) in zip(first, DAMAGES.items(), strict=True):
        assert path == "step-00000001", what
        assert kept == ["step-00000001", "step-00000002.damaged"], what
        (reason,) = reasons
        assert "step-00000002" in reason, what
        assert re.search(told.replace("{file}", name), reason), (what, reason)
        assert "\n" not in reason, what


def test_one_process_names_the_damage_of_several(tmp_path: Path) -> None:
    chosen = settings(steps=1)
    launch(2, train, tmp_path, chosen, False)
    (path,) = list_checkpoints(tmp_path)
    (first, *_) = sorted(path.glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=rf"step-00000001: {first.name}: expected {len(whole)} bytes"):
        distiller(None, tmp_path, chosen).resume()
