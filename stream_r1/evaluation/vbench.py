"""VBench (Huang et al., arXiv 2311.17982): its prompts, its results, its totals.

Its tool scores videos in an environment of its own (`vbench_env`), for it needs older libraries. Nothing of
it is copied here but facts: the 16 dimensions, the range that each is normalised by and its weight
(`scripts/constant.py` of its repository), and how the totals are made of them (its README).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from stream_r1.files import FileError, parse_json, read_json, read_text
from stream_r1.messages import shown

FULL_INFO = "VBench_full_info.json"
RESULTS = "_eval_results.json"
COPIES = 5
"""Videos a prompt that its tool looks for."""


class Dimension(NamedTuple):
    """Of what a dimension counts to, its range as normalised, and its weight there."""

    group: Literal["quality", "semantic"]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension("quality", 0.1462),
    "background_consistency": Dimension("quality", 0.2615),
    "temporal_flickering": Dimension("quality", 0.6293),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "object_class": Dimension("semantic"),
    "multiple_objects": Dimension("semantic"),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial_relationship": Dimension("semantic"),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", 0.0, 0.364),
    "overall_consistency": Dimension("semantic", 0.0, 0.364),
}


class Totals(NamedTuple):
    """Scores in [0, 1]."""

    quality: float
    semantic: float
    total: float


class Published(NamedTuple):
    """A published row, per cent; None: not told. `source` says where it stands."""

    name: str
    total: float
    quality: float | None
    semantic: float | None
    source: str


_STREAM_R1 = "Stream-R1, arXiv 2605.03849: 946 prompts, 5 s"
PUBLISHED = (
    Published("Stream-R1 1.3B", 84.40, 85.14, 81.44, _STREAM_R1),
    Published("Wan2.1", 84.26, None, None, f"{_STREAM_R1}; another paper gives this teacher 82.78"),
    Published("Reward Forcing 1.3B", 84.13, None, None, _STREAM_R1),
    Published("Self Forcing 1.3B", 83.80, None, None, _STREAM_R1),
    Published("ModelScope", 75.75, 78.05, 66.54, "VBench's leaderboard"),
)


def totals(scores: Mapping[str, float]) -> Totals | None:
    """Quality, semantic and total score of the 16 dimensions, raw scores in [0, 1]; None where one is
    missing, which VBench would count as 0.

    (score - low) / (high - low) each; the weighted mean a group; (4 quality + semantic) / 5.
    """
    if any(name not in scores for name in DIMENSIONS):
        return None
    groups = {}
    for group in ("quality", "semantic"):
        chosen = {name: d for name, d in DIMENSIONS.items() if d.group == group}
        summed = sum(d.weight * (scores[name] - d.low) / (d.high - d.low) for name, d in chosen.items())
        groups[group] = summed / sum(d.weight for d in chosen.values())
    quality, semantic = groups["quality"], groups["semantic"]
    return Totals(quality, semantic, (4 * quality + semantic) / 5)


def read_prompt_list(path: Path, dimensions: Sequence[str] = tuple(DIMENSIONS)) -> list[str]:
    """The prompts of these dimensions, each once, in the list's order.

    Args:
        path: its `VBench_full_info.json`, or a folder that has it, or has it in vbench/.

    Raises:
        FileError: no such list, or a prompt that can't be part of a file's name.
    """
    path = full_info(path)
    entries = parse_json(read_text(path, "VBench's list of prompts"), str(path))
    if not isinstance(entries, list) or not entries:
        raise FileError(f"{path}: expected a list of prompts with their dimensions, got {shown(entries)}")
    prompts: dict[str, None] = {}
    for number, entry in enumerate(entries):
        prompt = entry.get("prompt_en") if isinstance(entry, dict) else None
        about = entry.get("dimension") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not isinstance(about, list):
            raise FileError(f"{path}: entry {number}: expected prompt_en and dimension, got {shown(entry)}")
        if "/" in prompt or "\0" in prompt or len(f"{prompt}-00.mp4".encode()) > 255:
            raise FileError(
                f"{path}: entry {number}: expected a prompt that can name a file, got {shown(prompt)}"
            )
        if set(about) & set(dimensions):
            prompts[prompt] = None
    if not prompts:
        raise FileError(f"{path}: expected prompts of {', '.join(dimensions)}, got none")
    return list(prompts)


def full_info(path: Path) -> Path:
    """The file itself, of a file or of a folder with it."""
    if not path.is_dir():
        return path
    for place in (path / FULL_INFO, path / "vbench" / FULL_INFO):
        if place.is_file():
            return place
    raise FileError(f"{path}: expected a folder with {FULL_INFO} or vbench/{FULL_INFO}")


def read_results(folder: Path) -> dict[str, float]:
    """Scores by dimension, from every `*_eval_results.json` that its tool left in a folder.

    Raises:
        FileError: a file that is not one of its results.
    """
    scores: dict[str, float] = {}
    for path in sorted(folder.glob(f"*{RESULTS}")):
        for name, found in read_json(path).items():
            score = found[0] if isinstance(found, list) and found else math.nan
            if name not in DIMENSIONS or type(score) not in (int, float) or not math.isfinite(score):
                raise FileError(
                    f"{path}: {shown(name)}: expected VBench's score of a dimension, got {shown(found)}"
                )
            scores[name] = score
    return {name: scores[name] for name in DIMENSIONS if name in scores}
