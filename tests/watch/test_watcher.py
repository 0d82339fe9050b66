"""A watched run is the run; what is seen of it is right, survives a resume and a full disk."""

import json
import math
import random
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import torch
import wandb
from distill_models import StretchDecoder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from stream_r1.config import SettingsError
from stream_r1.distill.events import Preview, StepDone
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.distill.weighting import Weights
from stream_r1.sampling.video import read_video
from stream_r1.watch.settings import WandbSettings, WatchSettings
from stream_r1.watch.watcher import Watcher, draw_maps
from stream_r1.watch.writers import read_metrics

STEPS = 6


class DrawingDecoder(StretchDecoder):
    """Takes numbers from every global source of randomness, and uses one of them."""

    def decode(self, latents: Tensor) -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002
        return (super().decode(latents) + 0.05 * torch.rand(())).clamp(0, 1)


def trainer(folder: Path | None = None, *, vae: Any = None) -> DistillTrainer:
    rates = {"student": {"lr": 1e-3}, "critic": {"lr": 2e-3}}
    settings = small_run.settings(steps=STEPS, batch=4, accumulation=2, checkpoint_every=2, **rates)
    return small_run.trainer(settings, folder, vae=vae)


def watched(
    run: DistillTrainer, out: Path, stop_at: int = STEPS, **settings: Any
) -> tuple[list[dict[str, float]], list[str]]:
    """A run's numbers, and what the watcher complained of; a run that is left early leaves no checkpoint."""
    told: list[str] = []
    numbers = []
    with Watcher(run, WatchSettings(**settings), out, warn=told.append) as watcher:
        while run.step < stop_at:
            event = run.train_step()
            watcher.see(event)
            numbers.append(event.scalars)
    return numbers, told


def state(run: DistillTrainer) -> dict[str, Tensor]:
    parts = run.state.tensors()
    return {f"{part}/{name}": t.clone() for part, named in parts.items() for name, t in named.items()}


def events(out: Path) -> EventAccumulator:
    there = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return there.Reload()


def test_a_watched_run_is_the_run_bit_for_bit(tmp_path: Path) -> None:
    plain = trainer(vae=DrawingDecoder())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = [event.scalars for event in plain.run() if isinstance(event, StepDone)]
    drawn = random.random(), np.random.rand()  # noqa: NPY002
    seen = trainer(vae=DrawingDecoder())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    numbers, told = watched(seen, tmp_path, sample_every=1, prompts=("a", "b", "c"))
    assert told == []
    assert numbers == expected
    assert (random.random(), np.random.rand()) == drawn  # noqa: NPY002
    a, b = state(plain), state(seen)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert seen.student.training == plain.student.training


def test_every_number_is_there(tmp_path: Path) -> None:
    numbers, _ = watched(trainer(), tmp_path, sample_every=0)
    rows = list(read_metrics(tmp_path / "metrics.csv"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    first, second = rows[0], rows[1]
    for key in (
        *(f"reward/{axis}" for axis in ("VQ", "MQ", "TA", "mean")),
        *(f"{name}/{what}" for name in ("student", "critic") for what in ("loss", "grad_norm", "skipped")),
        *(f"inter/{what}" for what in ("min", "max", "std", "floored", "capped")),
        *(f"intra/{what}" for what in ("min", "max", "std", "spatial_floored", "temporal_floored")),
        *(f"seconds/{part}" for part in ("rollout", "reward", "scores", "backward", "critic", "optimizer")),
        *("seconds/step", "seconds/other", "tokens/second", "memory/rss_gib", "memory/rss_peak_gib"),
    ):
        assert math.isfinite(first[key]), key
    assert (first["student/lr"], first["critic/lr"]) == (1e-3, 2e-3)
    assert "student/loss" not in second  # the critic's turn alone
    parts = [v for k, v in first.items() if k.startswith("seconds/") and k != "seconds/step"]
    assert sum(parts) == pytest.approx(first["seconds/step"])
    # a rollout is 6 frames of 4 x 6 cells in patches of 2 x 2; 4 of them, twice
    tokens = first["tokens/second"] * first["seconds/step"]
    assert tokens == pytest.approx(2 * 4 * 6 * 2 * 3)
    there = events(tmp_path)
    for key in first.keys() - {"step"}:
        points = {e.step: e.value for e in there.Scalars(key)}
        expected = {row["step"]: row[key] for row in rows if key in row}
        assert points == pytest.approx(expected, rel=1e-6), key
    assert numbers[0]["intra/min"] < 1 < numbers[0]["intra/max"]


def test_several_steps_as_one(tmp_path: Path) -> None:
    """The last steps of a run may be fewer; those before a resume count with those behind it."""
    checkpoints, out = tmp_path / "checkpoints", tmp_path / "out"
    run = trainer(checkpoints)
    numbers, _ = watched(run, out, stop_at=2, sample_every=0, every=4)
    run.save()
    assert "critic/loss" not in events(out).Tags()["scalars"]
    run = trainer(checkpoints)
    run.resume()
    numbers += watched(run, out, sample_every=0, every=4)[0]
    there = events(out)
    losses = [row["critic/loss"] for row in numbers]
    students = [row.get("student/loss") for row in numbers]  # at steps 1, 3, 5
    found = {e.step: e.value for e in there.Scalars("critic/loss")}
    assert found == pytest.approx({4: sum(losses[:4]) / 4, 6: sum(losses[4:]) / 2}, rel=1e-6)
    found = {e.step: e.value for e in there.Scalars("student/loss")}
    assert found == pytest.approx({4: (students[0] + students[2]) / 2, 6: students[4]}, rel=1e-6)
    found = {e.step: e.value for e in there.Scalars("inter/max")}
    assert found[4] == pytest.approx(max(numbers[0]["inter/max"], numbers[2]["inter/max"]))
    assert len(list(read_metrics(out / "metrics.csv"))) == STEPS


def test_pictures_and_videos_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    run = trainer()
    watched(run, tmp_path, sample_every=2, prompts=("a red fox",), fps=8)
    there = events(tmp_path)
    assert [e.step for e in there.Images("sample/0")] == [0, 2, 4, 6]
    assert [e.step for e in there.Images("maps/weights")] == [1, 3, 5]
    samples = tmp_path / "samples"
    assert sorted(p.name for p in (samples / "step-00000003").iterdir()) == [
        *("maps-frames.png", "maps-saliency-MQ.png", "maps-saliency-TA.png", "maps-saliency-VQ.png"),
        "maps-weights.png",
    ]
    video, fps = read_video(samples / "step-00000006" / "sample-0.mp4")
    assert fps == 8
    expected = StretchDecoder().decode(run.sample(["a red fox"], [0]))[0]
    assert video.shape == expected.shape
    assert (video - expected).abs().mean() < 0.05  # mp4 is lossy
    shown = there.Images("sample/0")[-1]
    assert shown.encoded_image_string[:6] == b"GIF89a"
    before, _ = read_video(samples / "step-00000000" / "sample-0.mp4")
    assert not torch.equal(before, video)


@pytest.mark.parametrize("pixels", [(16, 24), (480, 720)])
def test_maps_show_where_the_weights_are(pixels: tuple[int, int]) -> None:
    """Over grey frames, only what is above the least weight has another colour, in its own place."""
    intra = torch.ones(1, 3, 1, 4, 6)
    hot = {(0, 0, 0), (1, 3, 5), (2, 1, 4)}
    for place in hot:
        intra[0, place[0], 0, place[1], place[2]] = 3.0
    saliency = intra[:, :, 0].expand(2, 2, -1, -1, -1) * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)
    weights = Weights(torch.ones(1), intra, torch.zeros(1, 2), saliency, {})
    drawn = draw_maps(Preview(["a"], torch.full((1, 9, 3, *pixels), 0.5), weights), ("VQ", "MQ"))
    assert list(drawn) == ["maps/frames", "maps/weights", "maps/saliency-VQ", "maps/saliency-MQ"]
    shapes = {picture.shape for picture in drawn.values()}
    assert len(shapes) == 1
    cell = drawn["maps/weights"].shape[0] // 4
    assert 160 <= 6 * cell <= 320
    gap = (drawn["maps/weights"].shape[1] - 3 * 6 * cell) // 2
    for name, picture in drawn.items():
        changed = np.abs(picture[..., :3].astype(int) - 128).sum(-1) > 9
        for f, r, c in np.ndindex(3, 4, 6):
            left = f * (6 * cell + gap) + c * cell
            patch = changed[r * cell : (r + 1) * cell, left : left + cell]
            expected = (f, r, c) in hot and name in ("maps/weights", "maps/saliency-VQ")
            assert patch.all() == patch.any() == expected, (name, f, r, c)


def test_a_killed_run_that_is_resumed_has_every_step_once(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    _, told = watched(trainer(), whole, sample_every=1, prompts=("a",))
    first = trainer(tmp_path / "checkpoints")
    told += watched(first, out, stop_at=4, sample_every=1, prompts=("a",))[1]
    first.save()
    told += watched(first, out, stop_at=5, sample_every=1, prompts=("a",))[1]  # dies before it keeps step 5
    (out / "metrics.csv").open("a").write("6,half a li")
    for file in (out / "tensorboard").iterdir():
        with file.open("ab") as stream:
            stream.write(b"\x20\0\0\0\0\0\0\0half")
    second = trainer(tmp_path / "checkpoints")
    second.resume()
    assert second.step == 4
    told += watched(second, out, sample_every=1, prompts=("a",))[1]
    assert told == []

    timed = ("seconds/", "memory/", "tokens/")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(f / "metrics.csv")]
        for f in (whole, out)
    ]
    assert rows[0] == rows[1]
    a, b = events(whole), events(out)
    assert a.Tags()["scalars"] == b.Tags()["scalars"]
    for tag in a.Tags()["scalars"]:
        assert [e.step for e in a.Scalars(tag)] == [e.step for e in b.Scalars(tag)], tag
        if not tag.startswith(timed):
            assert [e.value for e in a.Scalars(tag)] == [e.value for e in b.Scalars(tag)], tag
    for tag in a.Tags()["images"]:
        images = [[(e.step, e.encoded_image_string) for e in there.Images(tag)] for there in (a, b)]
        assert images[0] == images[1], tag
    assert sorted(p.name for p in (whole / "samples").iterdir()) == sorted(
        p.name for p in (out / "samples").iterdir()
    )


def test_a_run_that_starts_anew_forgets_the_one_before(tmp_path: Path) -> None:
    for steps in (5, 2):
        watched(trainer(), tmp_path, stop_at=steps, sample_every=1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2]
    assert [e.step for e in events(tmp_path).Scalars("critic/loss")] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        f"step-{step:08d}" for step in (0, 1, 2)
    ]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a growing file: writes past a size fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_warning_and_loses_no_row(tmp_path: Path) -> None:
    plain = trainer()
    expected = [event.scalars for event in plain.run() if isinstance(event, StepDone)]
    run, told, numbers = trainer(), [], []
    with Watcher(run, WatchSettings(sample_every=2), tmp_path, warn=told.append) as watcher:
        for step in range(STEPS):
            event = run.train_step()
            room = 4096 if 1 <= step <= 3 else resource.RLIM_INFINITY
            with files_of_at_most((tmp_path / "metrics.csv").stat().st_size + 3 if room == 4096 else room):
                watcher.see(event)
            numbers.append(event.scalars)
    assert numbers == expected
    a, b = state(plain), state(run)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    rows = list(read_metrics(tmp_path / "metrics.csv"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["critic/loss"] for row in rows] == [row["critic/loss"] for row in expected]
    assert any("metrics.csv" in text and "File too large" in text for text in told)
    assert any("tensorboard" in text for text in told)
    assert sum("metrics.csv" in text for text in told) == 1  # not at every step
    assert [e.step for e in events(tmp_path).Scalars("critic/loss")][-2:] == [5, 6]  # there is room again


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError):
        Watcher(trainer(), WatchSettings(), tmp_path / "out")
    with files_of_at_most(0), pytest.raises(OSError, match="File too large"):
        Watcher(trainer(), WatchSettings(), tmp_path / "other")


class BrokenDecoder(StretchDecoder):
    """Fails where samples are decoded, one video at a time."""

    def decode(self, latents: Tensor) -> Tensor:
        if len(latents) == 1:
            raise RuntimeError("no room for this video")
        return super().decode(latents)


def test_a_sample_that_fails_is_told_and_the_training_goes_on(tmp_path: Path) -> None:
    run = trainer(vae=BrokenDecoder())
    numbers, told = watched(run, tmp_path, sample_every=1)
    assert len(numbers) == STEPS
    assert told == ["watching, sample: no room for this video; the training continues"]


@pytest.mark.parametrize(
    ("package", "settings"),
    [("tensorboard", WatchSettings()), ("wandb", WatchSettings(wandb=WandbSettings(project="p")))],
)
def test_a_missing_package_is_told_before_any_work(
    package: str, settings: WatchSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=f"pip install {package}"):
        settings.require_packages()
    with pytest.raises(SettingsError, match=f"watch.{package}"):
        Watcher(trainer(), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    WatchSettings(tensorboard=False).require_packages()


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run, as LevelDB keeps logs: in pieces that lie within blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""  # behind the file's own header
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # behind a checksum
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last piece
            yield Record.FromString(record)
            record = b""


def test_wandb_keeps_a_run_offline(tmp_path: Path) -> None:
    offline = {"project": "watching", "mode": "offline"}
    settings = WatchSettings.model_validate({"sample_every": 2, "prompts": ("a",), "wandb": offline})
    told: list[str] = []
    run, numbers = trainer(), {}
    with Watcher(run, settings, tmp_path, config={"batch": 4}, warn=told.append) as watcher:
        for _ in range(2):
            event = run.train_step()
            watcher.see(event)
            numbers[event.step] = event.scalars
    assert told == []
    wandb.teardown()  # waits for the service's end: it writes beside us, also after a run was finished
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(wandb_records(kept))
    began = next(record.run for record in records if record.HasField("run"))
    assert (began.project, began.run_id) == ("watching", (tmp_path / "wandb-id.txt").read_text().strip())
    assert {item.key: json.loads(item.value_json) for item in began.config.update}["batch"] == 4
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            found[record.history.step.num] = {key: json.loads(text) for key, text in items.items()}
    assert list(found) == [0, 1, 2]
    for step, scalars in numbers.items():
        expected = {key: value for key, value in scalars.items() if key != "tokens"}
        assert {key: found[step][key] for key in expected} == expected
    assert {"sample/0"} == {key for key in found[0] if not key.startswith("_")}
    media = list(kept.parent.glob("files/media/**/*.*"))
    assert {p.suffix for p in media} == {".png", ".gif"}
