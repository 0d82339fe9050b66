"""Three clean drawings that no training has seen.

Also lets this folder's tests import what they share (importlib mode leaves sys.path alone).
"""

import sys
from pathlib import Path

import pytest
import torch

from stream_r1.drawn_world import HELD_OUT, Scene, draw

sys.path.insert(0, str(Path(__file__).parent))

PROMPTS = (
    "a red ball rolls to the left in a meadow at noon",
    "a yellow star bounces in the snow at dawn",
    "a blue box swings on a rope by the sea at night",
)


@pytest.fixture(scope="session")
def clean_clips():
    """[3, 21, 3, 64, 112] in [0, 1], and a prompt each."""
    clips = [
        draw(Scene.of(prompt), HELD_OUT + 1000 + index, 21).frames for index, prompt in enumerate(PROMPTS)
    ]
    return torch.stack([torch.from_numpy(clip).movedim(-1, 1).float() / 255 for clip in clips]), list(PROMPTS)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A small VideoReward folder; tests that change one take a copy."""
    from videoalign_folder import write_reward

    return write_reward(tmp_path_factory.mktemp("videoalign"))


@pytest.fixture(scope="session")
def videoalign(written):
    """The reward in it, shown every frame, with an instruction short enough for tests."""
    from videoalign_folder import open_reward

    return open_reward(written.folder)
