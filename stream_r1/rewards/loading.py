"""From a folder to the reward that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stream_r1.files import read_json
from stream_r1.messages import shown
from stream_r1.rewards.base import Reward
from stream_r1.rewards.small import SmallReward


def load_reward(spec: str | Path, *, device: str | torch.device = "cpu", **settings: Any) -> Reward:
    """Loads a reward from its folder.

    What kind it is stands in the folder's `config.json` as "type": "small" or "videoalign". The published
    VideoReward folder is known by its `model_config.json`.

    Args:
        settings: of `VideoAlignSettings`, over those of the folder; "small" has none.

    Raises:
        FileNotFoundError: no such folder, or no config in it.
        ValueError: an unknown type, settings that it does not have, or files that don't fit together (see
            each reward's `from_pretrained`).
    """
    folder = Path(spec)
    path = folder / "config.json"
    published = (folder / "model_config.json").is_file()
    if not path.is_file() and not published:
        raise FileNotFoundError(
            "load_reward: spec: expected a folder with a config.json or VideoAlign's model_config.json, "
            f"got {folder}"
        )
    kind = read_json(path).get("type") if path.is_file() else None
    if kind == "small":
        if settings:
            raise ValueError(f"load_reward: settings: expected none for {path}, got {', '.join(settings)}")
        return SmallReward.from_pretrained(folder).to(device)
    if kind == "videoalign" or (kind is None and published):
        # Here, because transformers' models take a second to import.
        from stream_r1.rewards.videoalign import VideoAlignReward

        return VideoAlignReward.from_pretrained(folder, device=device, **settings)
    raise ValueError(f'load_reward: spec: expected type "small" or "videoalign" in {path}, got {shown(kind)}')
