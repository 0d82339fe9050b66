"""Two models' videos of three prompts, as small as they get."""

from __future__ import annotations

from pathlib import Path

import torch

from stream_r1.sampling.video import VideoWriter
from stream_r1.votes.plan import Comparison, load

PROMPTS = ["a red ball rolls", "a blue box floats", "a star"]


def write_comparison(folder: Path, **settings: object) -> Path:
    """The YAML file of a comparison in `folder`."""
    for model, shade in (("plain", 0.3), ("weighted", 0.6)):
        for index in range(len(PROMPTS)):
            path = folder / model / f"clip-{index + 8}.mp4"  # 8, 9, 10: not in the order of letters
            with VideoWriter(path, 8) as writer:
                ramp = torch.linspace(0, 1, 32).expand(9, 3, 24, 32) * shade
                writer.write(ramp + index / 10)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    lines = [
        f"models: {{plain: {folder / 'plain'}, weighted: {folder / 'weighted'}}}",
        f"prompts: {folder / 'prompts.txt'}",
        f"out: {folder / 'out'}",
        *(f"{key}: {value}" for key, value in settings.items()),
    ]
    path = folder / "votes.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def comparison(folder: Path, **settings: object) -> Comparison:
    return load(write_comparison(folder, **settings), [])
