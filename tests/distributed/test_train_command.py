"""`stream-r1 train` on two processes: by torchrun, and as a launcher would start it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from workers import launch

from stream_r1.cli import main
from stream_r1.config import SettingsError
from stream_r1.models.checkpoints import load_student
from stream_r1.recipe import InitRecipe, Recipe, load, load_any, load_start
from stream_r1.sampling.video import read_video
from stream_r1.watch.writers import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN += ["-m", "stream_r1"]


def command(*arguments: str, only_on_1: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """A command's exit code and what it wrote."""
    extra = only_on_1 if os.environ.get("RANK") == "1" else ()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*arguments, *extra])
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("the command line returned")


def command_with_own(*arguments: str) -> tuple[int, str, str]:
    return command(*arguments[:-1], only_on_1=(arguments[-1],))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_student(folder / "student").state_dict()


def test_torchrun_trains_what_one_process_trains(world: Path, tmp_path: Path) -> None:
    recipe = world / "recipe.yaml"
    smooth = ("student.eps=0.01", "critic.eps=0.01")
    assert command("train", str(recipe), f"out={tmp_path / 'one'}", *smooth)[0] == 0
    arguments = ["train", str(recipe), f"out={tmp_path / 'two'}", *smooth, "distributed.shard=full"]
    done = subprocess.run(
        [*TORCHRUN, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student:") == 1
    assert "Warning" not in done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = load_student(world / "student").state_dict()
    assert any(not torch.equal(one[name], start[name]) for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
    rows = read_metrics(tmp_path / "two" / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    videos = sorted(str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*.mp4"))
    assert videos == [
        f"samples/step-0000000{step}/sample-{i}.mp4" for step in (0, 4) for i in range(len(videos) // 2)
    ]
    assert len(videos) == 4
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    (checkpoint,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000004"
    with pytest.raises(ValueError, match="step-00000004: a training run's checkpoint; the run exports"):
        load_student(checkpoint)


def test_sigterm_to_torchrun_ends_all_after_the_same_step(world: Path, tmp_path: Path) -> None:
    """With a checkpoint, an exported student, and one message; one process continues from there."""
    out = tmp_path / "out"
    arguments = ["train", str(world / "recipe.yaml"), f"out={out}", "watch.sample_every=0"]
    run = subprocess.Popen(
        [
            *TORCHRUN,
            *arguments,
            "steps=100000",
            "distributed.shard=full",
            "distributed.async_checkpoints=true",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while _rows(out) < 3:
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        run.terminate()
        told, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert _rows(out) == step
    assert told.count(f"stopped by SIGTERM after step {step} of 100000") == 1
    weights(out)
    code, told, _ = command(*arguments, f"steps={step + 1}")
    assert code == 0
    assert f"resuming from {checkpoint}" in told


def _rows(out: Path) -> int:
    """Steps in metrics.csv, which may be being written."""
    path = out / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def _command_and_signal(number: int, out: Path, *arguments: str) -> int:
    """The command's exit code; the second rank is sent a signal amid the run."""
    if os.environ["RANK"] == "1":
        threading.Thread(target=_send_later, args=(number, out), daemon=True).start()
    return command(*arguments, f"out={out}")[0]


def _send_later(number: int, out: Path) -> None:
    while _rows(out) < 2:
        time.sleep(0.05)
    os.kill(os.getpid(), number)


def test_every_rank_s_status_says_which_signal_stopped_the_run(world: Path, tmp_path: Path) -> None:
    recipe, extra = str(world / "recipe.yaml"), ("steps=100000", "watch.sample_every=0")
    codes = launch(2, _command_and_signal, signal.SIGTERM, tmp_path / "out", "train", recipe, *extra)
    assert codes == [143, 143]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("student.lr=0.5", "every rank must have the same student"),
        ("models.teacher=nowhere", "rank 1 of 2: models are missing"),
    ],
)
def test_an_error_is_told_once(world: Path, tmp_path: Path, override: str, told: str) -> None:
    out = tmp_path / "out"
    results = launch(2, command_with_own, "train", str(world / "recipe.yaml"), f"out={out}", override)
    assert [code for code, _, _ in results] == [2, 2]
    assert "".join(out for _, out, _ in results).strip() == ""
    assert told in "".join(err for _, _, err in results)
    assert sum(err != "" for _, _, err in results) == 1
    assert not out.exists()


def test_a_start_is_learnt_from_trajectories_that_processes_make_together(
    world: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    start = {
        "kind": "ode-init",
        "models": {name: recipe["models"][name] for name in ("student", "teacher", "vae")},
        "prompts": recipe["prompts"],
        "rollout": recipe["rollout"] | {"steps": [1000, 500]},
        "pairs": {"folder": str(tmp_path / "pairs"), "count": 3, "solver_steps": 2, "batch": 1},
        "steps": 2,
        "batch": 2,
        "optimizer": {"lr": 1e-3},
        "watch": {"prompts": ["a lake that no trajectory shows"]},
    }
    path = tmp_path / "start.yaml"
    path.write_text(yaml.safe_dump(start))
    code, _, err = command("train", str(path), f"out={tmp_path / 'early'}")
    assert code == 2
    assert "data ode-pairs RECIPE makes them" in err
    assert [code for code, _, _ in launch(2, command, "data", "ode-pairs", str(path))] == [0, 0]
    assert len(list((tmp_path / "pairs").glob("pairs-*.safetensors"))) == 3
    for override, told in (
        ("rollout.height=8", "rollout.height: expected 4 as in"),
        ("rollout.steps=[1000]", "rollout.steps, shifted: expected [1000.0, 833.3] as in"),
        ("pairs.count=4", "has 3 of 4 trajectories"),
        ("models.vae=null", "watch.prompts: expected models.vae too"),
        ("pairs.negative_prompt=blurred", "was made of other prompts"),
    ):
        code, _, err = command("train", str(path), f"out={tmp_path / 'other'}", override)
        assert code == 2
        assert told in err
    code, _, err = command("data", "ode-pairs", str(path), "rollout.height=8")
    assert code == 2
    assert "was made with latent_shape = [6, 4, 4, 6], this is [6, 4, 8, 6]" in err
    begun = load_student(world / "student").state_dict()
    for kind in ("ode-init", "teacher-forcing"):
        out = tmp_path / kind
        results = launch(2, command, "train", str(path), f"out={out}", f"kind={kind}")
        assert [code for code, _, _ in results] == [0, 0]
        assert any(not torch.equal(value, begun[name]) for name, value in weights(out).items())
        shown = sorted((out / "samples").glob("*/*"))
        assert [path.parent.name[-1] for path in shown] == ["0", "2"]
        assert all(len(read_video(path)[0]) > 1 for path in shown)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("wan2*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_published_recipes(path: Path) -> None:
    """They load, are refused nothing, and divide among 8 GPUs."""
    recipe = load_any(path)
    assert type(recipe) is (InitRecipe if path.stem in ("ode-init", "teacher-forcing") else Recipe)
    assert recipe.batch % (8 * recipe.accumulation) == 0
    assert load_any(path, ["seed=1"]).seed == 1
    code, out, _ = command("train", str(path), "--check")
    assert code == 0
    assert "shard: full" in out


def test_another_kind_of_recipe_is_refused() -> None:
    folder = ROOT / "recipes" / "wan2.1-1.3b"
    with pytest.raises(
        SettingsError, match="kind: expected one of distill, ode-init, teacher-forcing, got 'ode'"
    ):
        load_any(folder / "ode-init.yaml", ["kind=ode"])
    with pytest.raises(SettingsError, match="kind: expected distill, got 'ode-init'"):
        load(folder / "ode-init.yaml")
    with pytest.raises(SettingsError, match="kind: expected ode-init or teacher-forcing, got 'distill'"):
        load_start(folder / "stream-r1.yaml")
