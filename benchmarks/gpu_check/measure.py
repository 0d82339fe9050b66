"""Times the ops and the sampler on this machine's GPU, and writes the table: last step of `make gpu-check`.

python -m benchmarks.gpu_check.measure docs/gpu-measured.md
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.gpu_check.rivals import Case, Sizes, cases
from stream_r1.estimate.work import cast
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE
from stream_r1.sampling.sampler import Sampler

HEAD = """# GPUs: measured

What `make gpu-check` measured, a section a GPU; running it again replaces that GPU's section. What is
predicted is in [gpu.md](gpu.md).
"""
NOBODY = "Nobody has run it yet: no GPU has been measured."
WRONG = 0.05  # of the largest value, in 16 bits: more than rounding


@dataclass(frozen=True)
class Fps:
    """Of a stream whose window is full."""

    label: str
    fps: float
    student: float  # seconds a chunk
    decoder: float
    memory: int  # bytes, at most, with the models


def time_of(run: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Median seconds of a call, after warming up, in as many calls as the budget of seconds allows."""
    for _ in range(3):
        run()
    started = time.perf_counter()
    _finish(device)
    run()
    _finish(device)
    rounds = max(5, min(200, int(budget / max(1e-6, time.perf_counter() - started))))
    if device.type != "cuda":
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        run()
        end.record()
    _finish(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_case(case: Case, device: torch.device, budget: float = 0.5) -> dict[str, float]:
    """Median seconds by implementation, each checked against the case's first.

    Raises:
        ArithmeticError: one of them is wrong; nothing is timed then.
    """
    plain, *_ = case.runs.values()
    expected = _tensors(plain())
    for name, run in case.runs.items():
        for got, wanted in zip(_tensors(run()), expected, strict=True):
            error = (got.float() - wanted.float()).abs().max().item()
            largest = wanted.float().abs().max().item()
            if not error <= WRONG * largest:
                raise ArithmeticError(f"{case.op}, {case.name}: {name} is off by {error} of {largest}")
    return {name: time_of(run, device, budget) for name, run in case.runs.items()}


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def sampler_fps(
    student: CausalWanTransformer,
    vae: VideoVAE,
    latent_size: tuple[int, int],
    *,
    cuda_graph: bool,
    chunks: int = 4,
) -> Fps:
    """The mean of so many chunks, after the window is full and graphs are captured."""
    config, device = student.config, student.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sampler = Sampler(student, vae, latent_size=latent_size, cuda_graph=cuda_graph)
    embeds = torch.zeros(1, config["text_len"], config["text_dim"], device=device)
    stream = sampler.stream(embeds)
    slots = (config["window_frames"] - config["sink_frames"]) // config["frames_per_chunk"]
    for _ in range(config["window_frames"] // config["frames_per_chunk"] + slots):
        next(stream)
    made = [next(stream) for _ in range(chunks)]
    total = sum(chunk.timings.total for chunk in made)
    frames = sum(chunk.frames.shape[1] for chunk in made if chunk.frames is not None)
    return Fps(
        "CUDA graphs" if cuda_graph else "op by op",
        frames / total,
        sum(chunk.timings.denoise + chunk.timings.cache for chunk in made) / chunks,
        sum(chunk.timings.decode for chunk in made) / chunks,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def random_models(
    student: dict[str, Any], autoencoder: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[CausalWanTransformer, VideoVAE]:
    """With random weights, made where they are used."""
    torch.manual_seed(0)
    with torch.device(device):
        model = cast(CausalWanTransformer(**student), dtype).eval().requires_grad_(False)
        return model, VideoVAE(cast(AutoencoderKLWan(**autoencoder), dtype))


def section(
    machine: str, software: str, fps: list[Fps], timings: dict[str, dict[str, float]], predicted: float | None
) -> str:
    """A GPU's part of the page."""
    rows = [
        f"| {each.label} | {each.fps:.1f} | {1e3 * each.student:.0f} | {1e3 * each.decoder:.0f} "
        f"| {each.memory / 1e9:.1f} |"
        for each in fps
    ]
    beside = "" if predicted is None else f" Predicted in `docs/gpu.md`: {predicted:.1f} FPS."
    names = list(dict.fromkeys(name for runs in timings.values() for name in runs))
    lines = []
    for case, runs in timings.items():
        cells = [f"{1e6 * runs[name]:.0f}" if name in runs else "" for name in names]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"## {machine}",
            "",
            f"{software}. Wan 2.1 1.3B with random weights, 480 x 832, bfloat16, window full.{beside}",
            "",
            "| passes | FPS | student, ms a chunk | decoder, ms a chunk | memory, GB |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
            "Ops, median µs of a call; what is timed was checked against the row's first before:",
            "",
            f"| op | {' | '.join(names)} |",
            f"|---|{'---:|' * len(names)}",
            *lines,
            "",
        ]
    )


def put_section(file: Path, text: str) -> None:
    """Add a section to the page, or replace the one of the same machine."""
    page = file.read_text(encoding="utf-8") if file.exists() else ""
    _, *sections = re.split(r"(?m)^(?=## )", page)
    title = text.splitlines()[0]
    kept = [each for each in sections if each.splitlines()[0] != title]
    parts = [part.rstrip() for part in [HEAD, *kept, text]]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(file: Path) -> None:
    from benchmarks.prediction import streaming
    from stream_r1.commands.outputs import check_files
    from stream_r1.estimate.devices import DEVICES

    check_files("FILE", [file], {})
    device = torch.device("cuda")
    machine = torch.cuda.get_device_name(device)
    timings = {f"`{case.op}`, {case.name}": time_case(case, device) for case in cases(Sizes(), device)}
    torch.cuda.empty_cache()
    student, vae = random_models(streaming.WAN | {"sink_ema": 0.999}, {}, device, torch.bfloat16)
    fps = [sampler_fps(student, vae, streaming.LATENT, cuda_graph=graph) for graph in (False, True)]
    known = next((d for d in DEVICES.values() if d.name in machine), None)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit}"
    predicted = None if known is None else streaming.ours(known).fps(known)
    text = section(machine, software, fps, timings, predicted)
    put_section(file, text)
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
