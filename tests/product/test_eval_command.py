"""`stream-r1 eval` on the smallest world: made, measured, killed and gone on with, and its tables."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from command_line import run

from stream_r1.evaluation import Reference
from stream_r1.evaluation.kid import kernel_distance
from stream_r1.evaluation.single import video_figures
from stream_r1.models.checkpoints import load_student
from stream_r1.pixels import luma
from stream_r1.rewards import load_reward
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.video import read_video


@pytest.fixture(scope="module")
def other(world, tmp_path_factory):
    """Another student: the same with other weights."""
    folder = tmp_path_factory.mktemp("other") / "student"
    torch.manual_seed(1)
    student = load_student(world / "student")
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    student.save_pretrained(folder)
    return folder


def written(world, other, folder, **changes):
    recipe = {
        "models": {"a": {"folder": str(world)}, "b": {"folder": str(world), "checkpoint": str(other)}},
        "prompts": str(world / "prompts.txt"),
        "videos": 2,
        "seconds": 1.5,
        "size": [32, 48],
        "window": 0.5,
        "parts": ["figures", "reward", "drift", "latency"],
        "reward": str(world / "reward"),
        "reference": str(world / "reference.safetensors"),
        "shown": 1,
        "out": str(folder / "out"),
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return path


def test_an_evaluation_that_was_killed_goes_on_and_is_what_its_parts_say(world, other, tmp_path, capsys):
    path, out = written(world, other, tmp_path), tmp_path / "out"
    started = subprocess.Popen([sys.executable, "-m", "stream_r1", "eval", str(path)])
    first = out / "a" / "made" / "0000-0.json"
    while not first.exists():
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = first.read_bytes()

    assert run("eval", path) == 0
    assert first.read_bytes() == kept
    assert str(out / "index.html") in capsys.readouterr().out
    for model in ("a", "b"):
        names = sorted(p.name for p in (out / model / "videos").iterdir())
        assert names == ["0000-0.mp4", "0000-1.mp4", "0001-0.mp4", "0001-1.mp4"]
    prompts = (world / "prompts.txt").read_text().splitlines()

    # the same noise as a stream of this seed and index has, whichever model it is
    pipeline = StreamR1Pipeline.from_pretrained(world, size=(32, 48))
    stream = pipeline.sampler.stream([prompts[1]], seed=1, first_index=1, chunks=pipeline.chunks(36))
    wanted = torch.cat([chunk.frames[0] for chunk in stream])[:36]
    video, fps = read_video(out / "a" / "videos" / "0001-1.mp4")
    assert fps == 24
    another, _ = read_video(out / "a" / "videos" / "0001-0.mp4")
    own, apart = ((luma(seen) - luma(wanted)).abs().mean() for seen in (video, another))  # chroma is halved
    assert own < 0.02 < apart / 2

    # figures and differences, computed from the files in another way
    rows = {}
    with open(out / "results.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["group"], row["figure"], row["model"]] = row
    figures, axes = {}, {}
    reward = load_reward(world / "reward")
    for model in ("a", "b"):
        for index in (0, 1):
            for copy in (0, 1):
                video, _ = read_video(out / model / "videos" / f"000{index}-{copy}.mp4")
                figures[model, index, copy] = video_figures(video, prompts[index])["sharpness"]
                axes[model, index, copy] = float(reward.score(video[None], [prompts[index]])[0, 0])
    for group, name, values in (("figures", "sharpness", figures), ("reward", "VQ", axes)):
        means = {m: np.mean([v for (model, *_), v in values.items() if model == m]) for m in ("a", "b")}
        assert float(rows[group, name, "a"]["mean"]) == pytest.approx(means["a"], rel=1e-3)
        assert float(rows[group, name, "b"]["difference"]) == pytest.approx(
            means["b"] - means["a"], rel=1e-3, abs=1e-5
        )
        low, high = (float(rows[group, name, "b"][f"difference_{end}"]) for end in ("low", "high"))
        assert low <= means["b"] - means["a"] <= high
    features = [
        row
        for video in ("0000-0", "0000-1", "0001-0", "0001-1")
        for row in json.loads((out / "b" / "figures" / f"{video}.json").read_text())["found"]["features"]
    ]
    reference = Reference.load(world / "reference.safetensors").features
    kid = kernel_distance(torch.tensor(features), reference)
    assert float(rows["figures", "kid", "b"]["mean"]) == pytest.approx(kid, rel=1e-3)
    with open(out / "curves.csv", encoding="utf-8") as file:
        curves = list(csv.DictReader(file))
    assert [r["second"] for r in curves if (r["curve"], r["model"]) == ("match", "b")] == [
        "0.250",
        "0.750",
        "1.250",
    ]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<video") == 2
    assert page.count("<svg") == 8
    assert "http" not in page.replace("http://www.w3.org", "")
    told = json.loads((out / "results.json").read_text())
    assert told["videos"] == {"a": 4, "b": 4}
    assert told["latency"]["a"]["chunks"] == 4 * (pipeline.chunks(36) - 1)

    # a part more is all that is done; other settings or weights are refused
    marks = {p: p.stat().st_mtime_ns for p in out.rglob("*.json") if p.parent.name in ("made", "figures")}
    assert run("eval", path, "parts=[figures, latency]") == 0
    assert all(p.stat().st_mtime_ns == mark for p, mark in marks.items())
    capsys.readouterr()
    assert run("eval", path, "seed=5") == 2
    assert "made with seed other than the recipe's" in capsys.readouterr().err
    damaged = out / "b" / "figures" / "0001-0.json"
    damaged.write_text('{"found": 3')
    assert run("eval", path) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert str(damaged) in shown[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"parts": ["figure"]},
            "'vbench' or 'judge', got 'figure' (did you mean 'figures'?)",
        ),
        (
            {"models": {"a": {"folder": "/nowhere/model"}}},
            "models.a.folder: /nowhere/model: no such file or folder",
        ),
        ({"reward": None}, "reward: expected one for the part reward, got none"),
        ({"against": "c"}, "against: expected one of a, b, got 'c'"),
        ({"parts": ["judge"]}, "judges: expected one for the part judge, got none"),
        ({"prompts": "vbench"}, "vbench: expected where it is"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line_before_anything_runs(
    world, other, tmp_path, capsys, change, said
):
    assert run("eval", written(world, other, tmp_path, **change)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert said in told[0]
    assert not (tmp_path / "out").exists()
