"""The command line itself: quick help, replay's exit codes, info, and errors as one line."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from stream_r1.cli import main
from stream_r1.commands.progress import DistillationDisplay
from stream_r1.distill.events import StepDone
from stream_r1.distill.weighting import NOT_FINITE

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_help_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from stream_r1.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'diffusers', 'matplotlib', 'av'} & set(sys.modules)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "train", "sample", "replay", "data", "info"):
        assert command in done.stdout


def test_replay_says_how_far_apart_and_exits_by_the_tolerance(capsys):
    files = [GOLDEN / "stream_absolute_sink.safetensors", GOLDEN / "train_block_causal.safetensors"]
    assert run("replay", *files) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok") == 2
    assert run("replay", files[0], "--tolerance", "1e-12") == 1
    assert "past 1e-12" in capsys.readouterr().out


def test_replay_of_something_else_is_an_error(tmp_path, capsys):
    (tmp_path / "it.safetensors").write_bytes(b"nothing")
    assert run("replay", tmp_path / "it.safetensors") == 2
    assert run("replay", tmp_path / "there-is-none.safetensors") == 2
    shown = capsys.readouterr().err
    assert "no such recording" in shown
    assert "Traceback" not in shown


def test_replay_continues_past_a_file_that_it_refuses(tmp_path, capsys):
    good = GOLDEN / "train_block_causal.safetensors"
    nothing, missing, torn = (tmp_path / f"{name}[b].safetensors" for name in ("nothing", "none", "torn"))
    nothing.write_bytes(b"nothing")
    with safe_open(good, "pt") as file:
        meta = file.metadata() | {"config": json.dumps({"dim": 24})}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, torn, meta)
    assert run("replay", nothing, good, missing, torn, "--tolerance", "1e-12") == 2
    shown = capsys.readouterr()
    assert "train_block_causal" in shown.out
    refusals = shown.err.strip().splitlines()
    assert len(refusals) == 3
    for path, refusal in zip((nothing, missing, torn), refusals, strict=True):
        assert str(path) in refusal
    assert "num_heads" in refusals[2]
    assert run("replay", nothing) == 2


def test_info_of_machine_models_and_recipe(world, tmp_path, capsys):
    assert run("info") == 0
    assert "torch" in capsys.readouterr().out
    assert run("info", world, world / "recipe.yaml", world / "reference.safetensors") == 0
    shown = capsys.readouterr().out
    for part in ("CausalWanTransformer", "window_frames", "critic_updates: 2", "tensors"):
        assert part in shown
    assert run("info", tmp_path) == 2
    assert run("info", tmp_path / "nowhere") == 2
    (tmp_path / "cut.safetensors").write_bytes((world / "reference.safetensors").read_bytes()[:100])
    assert run("info", tmp_path / "cut.safetensors") == 2
    shown = capsys.readouterr().err
    assert "cut.safetensors: not a readable .safetensors file" in shown
    assert "neither a model folder" in shown
    assert "nowhere: no such file or folder" in shown


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no such recipe"):
        main(["train", str(tmp_path / "none.yaml"), "--debug"])


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "stream_r1", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command" in done.stderr


def test_the_display_counts_skipped_updates_and_draws_only_numbers():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with DistillationDisplay(console, "distilling", 3) as display:
        for step, loss in enumerate((1.0, math.nan, math.inf), 1):
            scalars = {
                "student/loss": loss,
                "student/skipped": float(not math.isfinite(loss)),
                NOT_FINITE: 0.0,
            }
            display.show(StepDone(step, 3, scalars, {}))
            console.print(display._render())
    shown = console.file.getvalue()
    assert "student loss 1.000, 2 updates skipped, not finite" in shown
    assert "not_finite" not in shown
