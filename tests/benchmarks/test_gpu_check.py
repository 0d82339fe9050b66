"""`make gpu-check` up to the point where it finds no GPU; its timings and its page, on the CPU and small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.measure import (
    HEAD,
    NOBODY,
    Fps,
    put_section,
    random_models,
    sampler_fps,
    section,
    time_case,
)
from benchmarks.gpu_check.rivals import Case, Sizes, cases

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Sizes(heads=2, head_dim=16, grid=(3, 4), video=9, compiled=False)


def test_without_a_gpu_it_says_so_and_exits_with_3() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"gpu-check: torch {torch.__version__} ")
    assert ("has no CUDA: install" in first) == (torch.version.cuda is None)
    assert second.startswith("gpu-check: nothing was built, tested or measured")


def test_make_runs_it() -> None:
    # A make run by a make (`make test` from a script of make's) prints which directory it enters and leaves.
    command = ["make", "-n", "--no-print-directory", "gpu-check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("bin/python -m benchmarks.gpu_check")


def test_architectures_are_those_with_their_own_instructions() -> None:
    arch = {
        capability: gpu_check.arch_of(capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    }
    assert list(arch.values()) == ["80", "89", "90a", "100a", "120"]


@pytest.mark.parametrize(("failing", "ran"), [(0, 1), (2, 3), (None, 4)])
def test_a_step_that_fails_is_the_last_one(
    failing: int | None, ran: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gpu_check.steps("80")
    assert real[0][2] == {"STREAM_R1_CUDA": "1", "STREAM_R1_CUDA_ARCHS": "80"}
    assert all((ROOT / folder).is_dir() for folder in real[2][1][4:])

    def steps(arch: str) -> list[tuple[str, list[str], dict[str, str]]]:
        exits = [f"raise SystemExit({index == failing:d})" for index in range(len(real))]
        names = [name for name, *_ in real]
        return [(name, [sys.executable, "-c", code], {}) for name, code in zip(names, exits, strict=True)]

    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "steps", steps)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu_check.main() == (failing is not None)
    said = capsys.readouterr().out
    assert said.count("raise SystemExit") == ran
    assert ("failed with 1; docs/gpu-measured.md is as it was" in said) == (failing is not None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_agree_and_are_timed() -> None:
    seen = set()
    for case in cases(SMALL, CPU):
        times = time_case(case, CPU, budget=0.01)
        seen.add(case.op)
        plain = "sdpa" if "attention" in case.op else "eager"
        flex = {"FlexAttention"} if "attention" in case.op and not case.backward else set()  # not on CPUs
        assert set(times) >= {plain, "ours, cpu"} | flex
        assert all(seconds > 0 for seconds in times.values())
    assert seen == {
        *("cached_chunk_attention", "chunk_attention", "modulated_norm", "gated_add", "qk_norm_rotary")
    }


def test_what_is_wrong_is_not_timed() -> None:
    x = torch.randn(8)
    case = Case("8", "copy", False, {"plain": lambda: x, "ours": lambda: x + 1})
    with pytest.raises(ArithmeticError, match=r"copy, 8: ours is off by 1\.0"):
        time_case(case, CPU, budget=0.01)


def test_frames_a_second_of_random_weights() -> None:
    student = {
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "text_len": 6, "freq_dim": 16},
        **{"ffn_dim": 32, "num_layers": 2, "window_frames": 9, "sink_frames": 3, "positions": "window"},
    }
    models = random_models(student, {"base_dim": 4, "num_res_blocks": 1}, CPU, torch.bfloat16)
    fps = sampler_fps(*models, (2, 4), cuda_graph=False, chunks=2)
    assert fps.fps == pytest.approx(12 / (fps.student + fps.decoder), rel=0.05)
    with pytest.raises(ValueError, match="cuda_graph needs the student on a CUDA device"):
        sampler_fps(*models, (2, 4), cuda_graph=True)


def test_the_page_has_a_section_a_machine(tmp_path: Path) -> None:
    file, fps = tmp_path / "gpu-measured.md", [Fps("op by op", 20.04, 0.35, 0.25, 12_300_000_000)]
    timings = {"`gated_add`, 8": {"eager": 2e-5, "ours, cuda": 4e-6}, "`chunk_attention`, 9": {"sdpa": 3e-3}}
    file.write_text(f"{HEAD}\n{NOBODY}\n")
    put_section(file, section("GPU A", "torch 2", fps, timings, 24.6))
    put_section(file, section("GPU B", "torch 2", fps, {}, None))
    faster = [Fps("op by op", 30.0, 0.2, 0.2, 12_300_000_000)]
    put_section(file, section("GPU A", "torch 3", faster, timings, 24.6))
    page = file.read_text()
    assert page.startswith(HEAD)
    assert NOBODY not in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## GPU B", "## GPU A"]
    assert "| op by op | 20.0 | 350 | 250 | 12.3 |" in page.split("## GPU A")[0]
    ours = page.split("## GPU A")[1]
    assert "| op by op | 30.0 | 200 | 200 | 12.3 |" in ours
    assert "Predicted in `docs/gpu.md`: 24.6 FPS." in ours
    assert "| op | eager | ours, cuda | sdpa |" in ours
    assert "| `gated_add`, 8 | 20 | 4 |  |" in ours
    assert "| `chunk_attention`, 9 |  |  | 3000 |" in ours
