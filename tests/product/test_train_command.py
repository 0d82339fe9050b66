"""`stream-r1 train` from the shell's side: a run, a resumed run, and what is refused before any work."""

import json
import shutil

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

from stream_r1.files import FileError
from stream_r1.models.checkpoints import load_student
from stream_r1.watch.writers import read_metrics


def history(folder):
    """The rows of metrics.csv, without what depends on the clock and the machine."""
    timed = ("seconds/", "memory/", "tokens/")
    rows = read_metrics(folder / "metrics.csv")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def test_a_run_in_two_parts_is_the_run_in_one(world, tmp_path):
    """Two steps, then two more, leave what four leave: the same student, the same history."""
    recipe = world / "recipe.yaml"
    assert run("train", recipe, f"out={tmp_path / 'whole'}") == 0
    assert run("train", recipe, f"out={tmp_path / 'parts'}", "steps=2") == 0
    assert run("train", recipe, f"out={tmp_path / 'parts'}") == 0
    whole, parts = (load_student(tmp_path / name / "student").state_dict() for name in ("whole", "parts"))
    start = load_student(world / "student").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], start[name]) for name in whole)
    numbers = [history(tmp_path / name) for name in ("whole", "parts")]
    assert numbers[0] == numbers[1]
    assert [line["step"] for line in numbers[0]] == [1, 2, 3, 4]
    assert "reward/VQ" in numbers[0][0]
    assert "student/loss" not in numbers[0][1]


def test_a_run_that_was_killed_while_it_exported_exports(world, tmp_path, capsys):
    command = ("train", world / "recipe.yaml", f"out={tmp_path / 'out'}", "steps=2")
    assert run(*command) == 0
    file = tmp_path / "out" / "student" / "diffusion_pytorch_model.safetensors"
    written = file.read_bytes()
    shutil.rmtree(file.parent)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000002.safetensors"
    with pytest.raises(FileError, match="a training run's checkpoint; the run exports its student to OUT"):
        load_student(checkpoint)
    assert run(*command) == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    assert file.read_bytes() == written


def test_a_run_is_not_continued_with_other_models_or_another_reward(world, tmp_path, capsys):
    """The folders may move; what is in them may not change, nor how the reward scores."""
    models = tmp_path / "models"
    for name in ("teacher", "reward"):
        shutil.copytree(world / name, models / name)
    command = ("train", world / "recipe.yaml", f"out={tmp_path / 'out'}")
    assert run(*command, "steps=2") == 0
    moved = [f"models.{name}={models / name}" for name in ("teacher", "reward")]
    assert run(*command, "steps=3", *moved) == 0
    assert run(*command, "reward.wrong=saturation") == 2
    assert "made with reward.wrong = None, this run has 'saturation'" in capsys.readouterr().err
    for name, file in (("teacher", "diffusion_pytorch_model.safetensors"), ("reward", "config.json")):
        content = (models / name / file).read_bytes()
        changed = content + b"\n" if name == "reward" else content[:-1] + b"?"
        (models / name / file).write_bytes(changed)
        assert run(*command, *moved) == 2
        assert f"made with models.{name} = " in capsys.readouterr().err
        (models / name / file).write_bytes(content)
    assert run(*command, *moved) == 0


def test_check_shows_a_recipe_and_trains_nothing(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", world / "recipe.yaml", f"out={out}", "weighting.mode=spatial", "--check") == 0
    assert "mode: spatial" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("weighting.mode=ful", "did you mean 'full'?"),
        ("rollout.frames=7", "whole chunks of 3"),
        ("rollout.width=7", "multiple of the student's patch"),
        ("models.teacher=nowhere", "models.teacher: nowhere: no such folder"),
        ("stream.sink_frames=6", "at least 9"),
        ("stream.sink_ema=0.99 stream.sink_frames=0", "sink_frames equal to a chunk"),
        ("prompts=nowhere.txt", "nowhere.txt: no such file"),
        ("reward.fps=all", "expected no settings for the small reward, got {'fps': 'all'}"),
        ("models.student={world}/vae", "models.student: expected WanTransformer3DModel or Causal"),
        ("models.vae={world}/student", "models.vae: expected AutoencoderKLWan or "),
        ("seed=-1", "seed: expected greater than or equal to 0, got -1"),
        ("seed=99999999999", "seed: expected less than 4294967296, got 99999999999"),
        ("reward.fps=-2", "reward.fps: expected greater than 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(world, tmp_path, capsys, override, told):
    out = tmp_path / "out"
    assert run("train", world / "recipe.yaml", *override.format(world=world).split(), f"out={out}") == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert "Traceback" not in shown.err
    assert not out.exists()


def test_a_folder_that_cannot_be_is_refused_before_models_are_loaded(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stream_r1.assembly.load_models", None)  # would fail
    (tmp_path / "file").touch()
    assert run("train", world / "recipe.yaml", f"out={tmp_path / 'file' / 'out'}") == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "out: expected a folder that can be written to" in told
    assert f"{tmp_path / 'file'} is no folder" in told


def test_a_teacher_that_lacks_weights_is_refused(world, tmp_path, capsys):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["blocks.0.attn1.to_q.weight"]
    save_file(state, file)
    assert run("train", world / "recipe.yaml", f"models.teacher={tmp_path / 'teacher'}") == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "teacher") in told
    assert "the weights do not fit the model; 1 missing: blocks.0.attn1.to_q.weight" in told


def test_a_teacher_of_other_latents_is_refused(world, tmp_path, capsys):
    other = tmp_path / "teacher"
    shutil.copytree(world / "teacher", other)
    config = json.loads((other / "config.json").read_text())
    wide = {"in_channels": 16, "out_channels": 16, "text_dim": 8}
    (other / "config.json").write_text(json.dumps(config | wide))
    assert run("train", world / "recipe.yaml", f"models.teacher={other}", "--check") == 2
    told = capsys.readouterr().err
    assert "expected in_channels 4" in told
    assert "expected text_dim 384" in told
