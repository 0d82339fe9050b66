"""Three clean clips of the film (Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0) from held-out shots.

Also lets this folder's tests import what they share (importlib mode leaves sys.path alone).
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

CAPTIONS = (
    "a pink butterfly flies around a rabbit seen from above",
    "a squirrel throws a stone at a pink butterfly",
    "a happy rabbit in the meadow with a pink butterfly",
)


@pytest.fixture(scope="session")
def clean_clips():
    """[3, 21, 3, 64, 112] in [0, 1], and a caption each; the picture has a clip a row, a frame a column."""
    picture = np.asarray(Image.open(Path(__file__).with_name("clips.png")))
    frames = picture.reshape(3, 64, 21, 112, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(frames.copy()).float() / 255, list(CAPTIONS)


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
