"""A checkpoint that is not what was written: named, set aside, and the one before it used."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import settings, trainer
from torch import Tensor

from stream_r1.distill.checkpoint_files import flatten, list_checkpoints, load_checkpoint
from stream_r1.distill.events import SetAside
from stream_r1.distill.loop import TrainingLoop
from stream_r1.distill.verification import CheckpointError, DamagedCheckpointError

CHOSEN = settings(steps=4, checkpoint_every=2)
NEWEST = "step-00000004.safetensors"
MOMENT = "student_optimizer/0/exp_avg"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingLoop:
    """With checkpoints of steps 2 and 4; it is at step 4."""
    made = trainer(CHOSEN, tmp_path_factory.mktemp("run"))
    for _ in made.run():
        pass
    return made


@pytest.fixture
def folder(run: TrainingLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's, to be damaged."""
    assert run.checkpoints.folder is not None
    shutil.copytree(run.checkpoints.folder, tmp_path / "run")
    monkeypatch.setattr(run.checkpoints, "folder", tmp_path / "run")
    return tmp_path / "run"


def rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    metadata: Callable[[dict[str, str]], object] = lambda metadata: None,
) -> None:
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        told = dict(file.metadata())
    change(tensors)
    metadata(told)
    path.unlink()
    save_file(tensors, path, metadata=told)


def values(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        def edit(told: dict[str, str]) -> None:
            content = json.loads(told["values"])
            change(content)
            told["values"] = json.dumps(content)

        rewrite(path, metadata=edit)

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object], *, signed: bool) -> Callable[[Path], None]:
    """signed: the file's own list of what it holds is gone, so that the run must find it."""
    forget = (lambda told: None) if signed else (lambda told: told.pop("tensors"))
    return lambda path: rewrite(path, change, forget)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-999] ^= 16
    path.write_bytes(content)


def all_but(names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(names)]:
            del tensors[name]

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


OF_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "another shape": (put(MOMENT, lambda t: torch.full((3,), 0.5)), f"{MOMENT}: .*float32.*got .*\\[3\\]"),
    "another dtype": (put(MOMENT, Tensor.double), f"{MOMENT}: .*float32.*got .*float64"),
    "not finite": (put("ema/proj_out.bias", lambda t: t * torch.nan), "ema/proj_out.bias"),
    "negative squares": (put("student_optimizer/2/exp_avg_sq", lambda t: -1 - t), "2/exp_avg_sq"),
    "half a count": (put("student_optimizer/2/step", lambda t: t + 0.5), "2/step"),
    "half a state": (all_but(MOMENT), "exp_avg"),
    "half an average": (all_but("ema/proj_out"), "ema.*proj_out"),
    "a parameter too many": (lambda t: t.update({"critic_optimizer/999/step": torch.ones(())}), "999/step"),
    "a part too many": (lambda t: t.update({"other/x": torch.ones(2)}), "other"),
    "no random state": (all_but("draws"), "draws.*random|random"),
    "a short random state": (put("draws/random", lambda t: t[:99].clone()), "random.*uint8.*99"),
    "a random state of floats": (put("draws/random", Tensor.float), "random.*uint8.*float32"),
    "noise for a random state": (put("draws/random", lambda t: t * 0 + 255), "random"),
}
OF_VALUES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no step": (lambda v: v.pop("step"), "step.*None"),
    "another step": (lambda v: v.update(step=3), "step: expected 4 .*got 3"),
    "a negative step": (lambda v: v.update(step=-4), "step.*-4"),
    "a step that is true": (lambda v: v.update(step=True), "step.*True"),
    "no order": (lambda v: v["own"].pop("order"), "order.*None"),
    "a place past the data": (lambda v: v["own"]["order"].update(position=99), "position.*99"),
    "a text as place": (lambda v: v["own"]["order"].update(position="2"), "order.*'2'"),
    "another window": (lambda v: v["own"]["weights"].update(window=3), "window.*3"),
    "a row too short": (lambda v: v["own"]["weights"]["history"][0].pop(), "history"),
    "infinite scores": (lambda v: v["own"]["weights"]["history"][0].append(1e400), "JSON"),
    "a list of skipped": (lambda v: v.update(skipped=[1]), "skipped.*1"),
    "no identity": (lambda v: v.pop("identity"), "identity.*None"),
}
OF_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 50), "readable"),
    "empty": (lambda path: os.truncate(path, 0), "readable"),
    "a bit": (flip_a_bit, "numbers"),
    "text": (lambda path: path.write_text("no checkpoint"), "readable"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "file"),
    "a link to itself": (lambda path: (path.unlink(), path.symlink_to(path)), "file"),
    "no format": (lambda path: rewrite(path, metadata=lambda told: told.pop("format")), "format.*None"),
    "no values": (lambda path: rewrite(path, metadata=lambda told: told.pop("values")), "values"),
    "broken values": (lambda path: rewrite(path, metadata=lambda t: t.update(values="{")), "JSON"),
    "deep values": (lambda path: rewrite(path, metadata=lambda t: t.update(values="[" * 99999)), "JSON"),
    "a folder of others'": (
        lambda path: (path.unlink(), path.mkdir(), (path / ".metadata").touch()),
        "found none",
    ),
}
DAMAGES = (
    [(f"{name}, {signed=}", tensors(do, signed=signed), told) for name, (do, told) in OF_TENSORS.items()
     for signed in (True, False)]
    + [(name, values(do), told) for name, (do, told) in OF_VALUES.items()]
    + [(name, do, told) for name, (do, told) in OF_FILES.items()]
)  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_the_one_before_is_used_and_nothing_is_lost(
    run: TrainingLoop, folder: Path, damage: Callable[[Path], object], told: str
) -> None:
    damage(folder / NEWEST)
    content = (folder / NEWEST).read_bytes() if (folder / NEWEST).is_file() else None
    resumed = run.resume()
    assert resumed == list_checkpoints(folder)[-1] == folder / "step-00000002.safetensors"
    parts, _ = load_checkpoint(resumed)
    own = flatten(run.state.tensors())
    assert own.keys() == flatten(parts).keys()
    assert all(torch.equal(own[name], t) for name, t in flatten(parts).items())
    event = next(run.run())
    assert isinstance(event, SetAside)
    assert (event.step, event.path) == (2, folder / f"{NEWEST}.damaged")
    assert re.search(told, event.reason)
    assert NEWEST in event.reason
    assert len(event.reason) < 600
    assert "\n" not in event.reason
    if content is not None:
        assert event.path.read_bytes() == content


def test_what_is_damaged_to_the_last_is_left_where_it_is(run: TrainingLoop, folder: Path) -> None:
    for path in list_checkpoints(folder):
        flip_a_bit(path)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(DamagedCheckpointError, match=f"{NEWEST}.*the 1 before it"):
        run.resume()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("format", ["2", "10"])
def test_another_version_s_is_refused_and_not_gone_past(run: TrainingLoop, folder: Path, format: str) -> None:
    rewrite(folder / NEWEST, metadata=lambda told: told.update(format=format))
    with pytest.raises(CheckpointError, match=f"format.*{format}"):
        run.resume()
    assert (folder / NEWEST).exists()


def test_other_settings_and_another_model_are_refused_and_not_gone_past(folder: Path) -> None:
    from distill_models import tiny_student

    with pytest.raises(CheckpointError, match=r"student\.lr = 0.01"):
        trainer(settings(student={"lr": 1.0}), folder).resume()
    with pytest.raises(CheckpointError, match=r"student.*another model") as error:
        trainer(CHOSEN, folder, student=tiny_student(num_layers=2)).resume()
    assert not isinstance(error.value, DamagedCheckpointError)
    assert len(list_checkpoints(folder)) == 2
