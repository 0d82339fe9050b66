"""How runs end: in one line, with the code that says why, and with what was done kept."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from safetensors.torch import load_file

from stream_r1 import assembly
from stream_r1.disk.lock import folder_lock
from stream_r1.distill.checkpoint_files import list_checkpoints


def test_a_folder_in_use_is_refused_before_models_are_loaded(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(assembly, "load_models", None)
    child = os.fork()
    if child == 0:
        with folder_lock(tmp_path):
            time.sleep(60)
    while not (tmp_path / ".in-use.json").exists():
        time.sleep(0.01)
    recipe = world / "recipe.yaml"
    try:
        for command in (
            ["train", recipe, f"out={tmp_path}"],
            ["demo", "--recipe", recipe, "--out", tmp_path],
        ):
            assert run(*command) == 2
            told = capsys.readouterr().err
            assert told.count("\n") == 1
            assert f"{tmp_path}: in use by process {child} on " in told
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_paths_and_prompts_are_text(world, tmp_path, capsys):
    out = tmp_path / "run[/x] [bold]a[/bold]:smile:x"
    for steps in (1, 2):
        assert (
            run("train", world / "recipe.yaml", f"out={out}", f"steps={steps}", "watch.sample_every=0") == 0
        )
        assert f"student: {out / 'student'}\n" in capsys.readouterr().out
    assert run("info", out / "student" / "diffusion_pytorch_model.safetensors") == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    (out / "checkpoints" / "[/damaged].yaml").mkdir(parents=True)
    assert run("info", out / "checkpoints" / "[/damaged].yaml") == 2
    assert "[/damaged].yaml" in capsys.readouterr().err


class Gone(io.StringIO):
    """A stream whose reader went after so many writes."""

    def __init__(self, number: int, after: int) -> None:
        super().__init__()
        self.number, self.left = number, after

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_run_outlives_its_output(number, world, tmp_path, monkeypatch, capsys):
    """A closed pipe, a lost terminal, a full disk under a log."""
    monkeypatch.setattr(sys, "stdout", Gone(number, after=1))
    command = ["train", world / "recipe.yaml", f"out={tmp_path}", "steps=1", "watch.sample_every=0"]
    assert run(*command) == 0
    assert (tmp_path / "student" / "config.json").exists()
    monkeypatch.setattr(sys, "stdout", Gone(number, after=0))
    assert run("info", world / "student") == (141 if number == errno.EPIPE else 2)
    told = capsys.readouterr().err
    assert ("standard output" in told) == (number != errno.EPIPE)


@pytest.fixture
def usual_signals():
    """As in a terminal: a shell's background job, or nohup, has some of them ignored from the start on."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "becomes"),
    [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGHUP, None), (signal.SIGINT, ImportError)],
)
@pytest.mark.usefixtures("usual_signals")
def test_a_signal_while_loading(number, becomes, world, tmp_path, capsys, monkeypatch):
    def load(*arguments):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if becomes is None:
                raise
            raise becomes("a module could not be imported") from None  # as native modules do

    monkeypatch.setattr(assembly, "load_models", load)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run("train", world / "recipe.yaml", f"out={tmp_path}") == 128 + number
    assert capsys.readouterr().err == f"stream-r1: stopped by {signal.Signals(number).name}\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert list(tmp_path.iterdir()) == []  # no lock is left


@pytest.mark.usefixtures("usual_signals")
def test_an_interrupt_amid_the_first_imports(tmp_path):
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), root))}
    ended = subprocess.run(
        [sys.executable, "-m", "stream_r1", "info"], env=environment, cwd=tmp_path, capture_output=True
    )
    assert (ended.returncode, ended.stderr) == (130, b"stream-r1: stopped by SIGINT\n")


def test_a_full_disk_loses_nothing_that_was_done(world, tmp_path, capsys):
    """A checkpoint at an interval that can't be written is reported, the last one ends the run."""
    command = ["train", world / "recipe.yaml", "checkpoint_every=1", "watch.sample_every=0"]
    command.append("watch.tensorboard=false")
    assert run(*command, f"out={tmp_path / 'plain'}", "steps=3") == 0
    out = tmp_path / "full"
    assert run(*command, f"out={out}", "steps=1") == 0
    (first,) = list_checkpoints(out / "checkpoints")
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.stat().st_size // 2, before[1]))
    try:
        assert run(*command, f"out={out}", "steps=3") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr()
    assert f"{out / 'checkpoints' / 'step-00000002.safetensors'}: File too large" in told.out
    assert told.err.count("\n") == 1
    assert f"{out / 'checkpoints' / 'step-00000003.safetensors'}" in told.err
    assert list(first.parent.iterdir()) == [first]
    assert run(*command, f"out={out}", "steps=3") == 0
    name = "student/diffusion_pytorch_model.safetensors"
    plain, full = load_file(tmp_path / "plain" / name), load_file(out / name)
    assert all((plain[key] == full[key]).all() for key in plain)


def test_a_damaged_record_of_a_demo_is_named(world, tmp_path, capsys):
    (tmp_path / "record.json").write_bytes(b'{"steps": \xff')
    assert run("demo", "--report-only", "--out", tmp_path) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(tmp_path / "record.json") in told


@pytest.mark.parametrize("damage", ["garbage", "folder", "columns"])
def test_damaged_diagnostics_stop_no_run(damage, world, tmp_path, capsys):
    command = ["train", world / "recipe.yaml", f"out={tmp_path}"]
    assert run(*command, "steps=1") == 0
    metrics, (events,) = tmp_path / "metrics.csv", (tmp_path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-20] + b"\xff" * 40)
    metrics.unlink()
    if damage == "folder":
        metrics.mkdir()
    else:
        metrics.write_bytes(b"\xff\xfe\0\x80" * 99 if damage == "garbage" else b"a,b\n1,x\n")
    (tmp_path / "samples" / "step-unknown").mkdir()
    capsys.readouterr()
    assert run(*command, "steps=2") == 0
    told = capsys.readouterr().out
    assert str(tmp_path / "metrics.csv.damaged") in told.replace("\n", "")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].startswith("2,")
    assert (tmp_path / "samples" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["stream_r1.tiny_world", "teacher", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["stream_r1.study.measure", "nowhere.yaml", "full", "0"], "nowhere.yaml: no such recipe"),
        (["stream_r1.evaluation.vbench_env", "somewhere", "--python", "no-python"], "got no-python"),
    ],
)
def test_a_module_that_is_a_command_ends_as_the_command_line_does(command, told, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
