"""`stream-r1 study` on the smallest world: trained, judged, killed and gone on with, and its tables."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from command_line import run

from stream_r1.rewards import load_reward
from stream_r1.rewards.wrong import WrongReward


def written(world, folder, **changes):
    study = {
        "recipe": str(world / "recipe.yaml"),
        "set": {"steps": 2, "guard": {"every": 1, "videos": 1, "then": "warn"}},
        "arms": {"uniform": {"weighting": {"mode": "uniform"}}, "wrong": {"reward": {"wrong": "saturation"}}},
        "against": "uniform",
        "seeds": [0],
        "videos": 3,
        "judge": str(world / "reward"),
        "reference": str(world / "reference.safetensors"),
        "shown": ["a red apple"],
        "out": str(folder / "out"),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes), encoding="utf-8")
    return path


def test_a_study_that_was_killed_goes_on_and_ends_with_a_page(world, tmp_path, capsys):
    path = written(world, tmp_path)
    out = tmp_path / "out"
    started = subprocess.Popen([sys.executable, "-m", "stream_r1", "study", str(path)])
    while not (out / "uniform" / "seed-0" / "figures.json").exists():
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait() != 0
    kept = (out / "uniform" / "seed-0" / "figures.json").read_bytes()

    assert run("study", path) == 0
    assert (out / "uniform" / "seed-0" / "figures.json").read_bytes() == kept
    figures = json.loads((out / "wrong" / "seed-0" / "figures.json").read_text())
    assert {"saturation", "motion", "judge/VQ", "kid"} <= figures.keys()
    assert len(figures["saturation"]) == 3
    with open(out / "differences.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"wrong"}
    changes = {row["figure"]: float(row["difference"]) for row in rows}
    base = json.loads(kept)
    for name in ("sharpness", "kid"):
        pairs = [a - b for a, b in zip(figures[name], base[name], strict=True)]
        assert changes[name] == pytest.approx(sum(pairs) / len(pairs), rel=1e-4, abs=1e-9)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<video") == 2
    assert page.count("0 of 1 runs") == 2  # alarms of the guard, an arm each
    assert "http" not in page.replace("http://www.w3.org", "")
    assert str(out / "index.html") in capsys.readouterr().out


def test_results_of_another_study_are_not_taken_for_this_ones(world, tmp_path, capsys):
    """Of other settings, of another number of videos, and of models whose files changed since."""
    teacher = tmp_path / "teacher"
    shutil.copytree(world / "teacher", teacher)
    models = {"teacher": str(teacher)}
    path = written(world, tmp_path, set={"steps": 1, "models": models})
    assert run("study", path) == 0
    kept = (tmp_path / "out" / "index.html").read_bytes()
    path = written(world, tmp_path, set={"steps": 3, "models": models})
    for more in ((), ("--report-only",)):
        capsys.readouterr()
        assert run("study", path, *more) == 2
        assert "begun with steps 1, now it is 3" in capsys.readouterr().err
    path = written(world, tmp_path, set={"steps": 1, "models": models}, videos=4)
    assert run("study", path) == 2
    assert "videos 3, now it is 4" in capsys.readouterr().err
    path = written(world, tmp_path, set={"steps": 1, "models": models})
    assert run("study", path) == 0
    weights = teacher / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert run("study", path) == 2
    assert "models.teacher" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").read_bytes() == kept


def test_arms_that_can_not_be_are_refused_before_anything_runs(world, tmp_path, capsys):
    path = written(world, tmp_path, arms={"uniform": {}, "odd": {"weighting": {"mode": "fulll"}}})
    assert run("study", path) == 2
    assert "arms.odd" in (told := capsys.readouterr().err)
    assert "weighting.mode" in told
    assert not (tmp_path / "out").exists()
    assert run("study", written(world, tmp_path, against="none")) == 2
    assert "against: expected one of uniform, wrong, got 'none'" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_stay(world, tmp_path, capsys):
    """A folder of a run where a file is in the way of its checkpoints."""
    path = written(world, tmp_path)
    bad = tmp_path / "out" / "wrong" / "seed-0"
    bad.mkdir(parents=True)
    (bad / "checkpoints").write_text("in the way")
    assert run("study", path) != 0
    assert str(bad) in capsys.readouterr().err
    assert (tmp_path / "out" / "uniform" / "seed-0" / "figures.json").is_file()


def test_wrong_rewards_have_gradients_and_no_sense(world):
    import torch

    right = load_reward(world / "reward")
    video = torch.rand(2, 5, 3, 32, 48).requires_grad_()
    prompts = ["a red apple", "a rabbit in a meadow"]
    noise = WrongReward(right, "noise")
    added = noise.score(video, prompts) - right.score(video, prompts)
    assert added.std() > 0.01
    assert torch.equal(added, WrongReward(right, "noise").score(video, prompts) - right.score(video, prompts))
    (slope,) = torch.autograd.grad(WrongReward(right, "saturation").score(video, prompts).sum(), video)
    greyer = video.detach().mean(2, keepdim=True).lerp(video.detach(), 0.5)
    scores = [WrongReward(right, "saturation").score(x, prompts) for x in (greyer, video.detach())]
    assert (scores[1] > scores[0]).all()
    assert slope.abs().sum() > 0


def test_a_run_is_guided_by_the_drawn_worlds_measures_and_by_no_other_prompts(world, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a fat rabbit\n", encoding="utf-8")
    measured = ("train", world / "recipe.yaml", "reward.measured=true", "steps=2", f"out={tmp_path / 'run'}")
    assert run(*measured, f"prompts={tmp_path / 'prompts.txt'}") != 0
    assert (
        "reward.measured: expected prompts of the drawn world, got 'a fat rabbit'" in capsys.readouterr().err
    )
    assert run(*measured) == 0
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        scores = [float(row["reward/TA"]) for row in csv.DictReader(file) if row["reward/TA"]]
    assert scores
    assert all(score == pytest.approx(-0.44 / 0.15, abs=0.5) for score in scores)  # noise has no red ball
