"""What a command writes to is checked before any model is loaded, and is never something that it reads."""

import os
from pathlib import Path

import pytest
from command_line import run
from PIL import Image

from stream_r1.commands.outputs import check_files, check_folder


@pytest.fixture
def no_models(monkeypatch):
    """Whatever loads a model fails the test."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("stream_r1.sampling.pipeline.StreamR1Pipeline.from_pretrained", loaded)
    for name in ("load_models", "make_trainer", "make_init_trainer", "write_ode_pairs"):
        monkeypatch.setattr(f"stream_r1.assembly.{name}", loaded)


def _itself(path: Path, tmp_path: Path) -> Path:
    return path


def _spelt(path: Path, tmp_path: Path) -> Path:
    return Path(os.path.relpath(path.parent)) / "." / ".." / path.parent.name / path.name


def _symlink(path: Path, tmp_path: Path) -> Path:
    (tmp_path / "soft.mp4").symlink_to(path)
    return tmp_path / "soft.mp4"


def _hard_link(path: Path, tmp_path: Path) -> Path:
    os.link(path, tmp_path / "hard.mp4")
    return tmp_path / "hard.mp4"


@pytest.mark.parametrize("name", [_itself, _spelt, _symlink, _hard_link])
def test_a_start_is_not_written_over(world, tmp_path, capsys, no_models, name):
    start = tmp_path / "start.mp4"
    start.write_bytes(b"precious")
    out = name(start, tmp_path)
    assert run("sample", "a fox", "--models", world, "--start", start, "--out", out) == 2
    told = capsys.readouterr().err
    assert "--out" in told
    assert "--start" in told
    assert start.read_bytes() == b"precious"


def test_whatever_is_written_is_checked(world, tmp_path, capsys, no_models):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    asked = ("sample", "a fox", "--models", world, "--start", tmp_path / "a.png")
    assert run(*asked, "--out", tmp_path / "a.mp4", "--sheet") == 2  # the sheet is a.png
    assert "a.png" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
    (tmp_path / "b-1.mp4").write_bytes(b"x")
    assert run("sample", "one", "two", "--start", tmp_path / "b-1.mp4", "--out", tmp_path / "b.mp4") == 2
    assert "b-1.mp4" in capsys.readouterr().err
    weights = next((world / "vae").glob("*.safetensors"))
    (tmp_path / "c.mp4").symlink_to(weights)
    assert run("sample", "a fox", "--models", world, "--out", tmp_path / "c.mp4") == 2
    assert "--models" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "sheet", "reference", "baselines"])
@pytest.mark.parametrize("kind", ["folder", "below a file", "link to a folder"])
def test_what_cannot_be_written_is_refused(world, tmp_path, capsys, no_models, command, kind):
    suffix = {"sample": "mp4", "sheet": "png"}.get(command, "json")
    out = tmp_path / f"a.{suffix}"
    if kind == "folder":
        out.mkdir()
    elif kind == "below a file":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / out.name
    else:
        (tmp_path / "folder").mkdir()
        out.symlink_to(tmp_path / "folder")
    arguments = {
        "sample": ("sample", "a fox", "--models", world),
        "sheet": ("data", "sheet"),
        "reference": ("data", "reference", "--prompts", world / "prompts.txt"),
        "baselines": ("data", "baselines", world / "recipe.yaml"),
    }[command]
    assert run(*arguments, "--out", out) == 2
    told = capsys.readouterr().err
    assert "--out" in told
    assert out.name in told


def test_runs_do_not_write_where_they_read(world, tmp_path, capsys, no_models):
    recipe = world / "recipe.yaml"
    for settings in (
        (f"out={world}",),  # exports to world/student, which it starts from
        (f"out={tmp_path}/run", f"models.student={tmp_path}/run/student"),
        (f"out={world}/recipe.yaml",),
        (f"out={world}/recipe.yaml/below",),
    ):
        (tmp_path / "run" / "student").mkdir(parents=True, exist_ok=True)
        assert run("train", recipe, *settings) == 2
        assert "out: expected" in capsys.readouterr().err
    assert run("demo", "--recipe", recipe, "--out", world) == 2
    assert "--out: expected a folder of its own" in capsys.readouterr().err


def test_a_demo_removes_nothing_that_is_not_a_demos(world, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "holidays.mp4").touch()
    for more in ((), ("--fresh",)):
        asked = ("demo", "--recipe", world / "recipe.yaml", "--out", tmp_path, *more)
        named = (f"reference={world}/reference.safetensors", f"judge={world}/reward")
        assert run(*asked, "--set", named[0], "--set", named[1]) == 2
        assert "earlier demo, got one with checkpoints" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "holidays.mp4"}


def test_checks_alone(tmp_path):
    check_files("--out", [tmp_path / "new" / "a.mp4"], {"--start": None, "--models": "owner/name"})
    check_folder("out", tmp_path / "new" / "run", {"models.student": tmp_path / "nowhere"})
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "new" / "b.mp4")
    check_files("--out", [tmp_path / "dangling.mp4"], {})
    (tmp_path / "a-0.mp4").touch()
    os.link(tmp_path / "a-0.mp4", tmp_path / "a-1.mp4")
    with pytest.raises(ValueError, match=r"--out.*a-1\.mp4.*a-0\.mp4"):
        check_files("--out", [tmp_path / "a-0.mp4", tmp_path / "a-1.mp4"], {})


def test_scales_are_bounded(world, tmp_path, capsys, no_models):
    asked = ("sample", "a fox", "--models", world, "--out", tmp_path / "a.mp4")
    assert run(*asked, "--size", "32x48", "--scale", 10**9) == 2
    assert "--scale: scale: expected sides up to 16384" in capsys.readouterr().err
    assert run(*asked, "--text-cache", world / "recipe.yaml") == 2
    assert "--text-cache" in capsys.readouterr().err
