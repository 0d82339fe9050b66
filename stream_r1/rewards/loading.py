"""From a folder to the reward that it holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stream_r1.rewards.base import Reward
from stream_r1.rewards.film import FilmReward


def load_reward(spec: str | Path, *, device: str | torch.device = "cpu") -> Reward:
    """Loads a reward from its folder; what kind it is stands in the folder's `config.json` as "type".

    Raises:
        FileNotFoundError: no such folder, or no config in it.
        ValueError: an unknown type.
        NotImplementedError: a VideoAlign checkpoint: this version cannot run it yet.
    """
    folder = Path(spec)
    if (folder / "model_config.json").is_file() and not (folder / "config.json").is_file():
        kind = "videoalign"  # the layout of the published VideoReward folder
    elif (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("type")
    else:
        raise FileNotFoundError(f"load_reward: spec: expected a folder with a config.json, got {folder}")
    if kind == "film":
        return FilmReward.from_pretrained(folder).to(device)
    if kind == "videoalign":
        raise NotImplementedError(
            f"load_reward: spec: {folder} holds a VideoAlign reward, which this version cannot run yet; "
            'available: "film" (python -m stream_r1.rewards.film_training makes one)'
        )
    raise ValueError(
        f'load_reward: spec: expected type "film" or "videoalign" in {folder / "config.json"}, got {kind!r}'
    )
