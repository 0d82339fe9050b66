"""Corruptions: in range, repeatable, stronger when asked to be, and what they claim about time."""

import numpy as np
import pytest
import torch

from stream_r1.rewards import corruptions

EVERY = {
    **corruptions.VISUAL,
    **corruptions.VISUAL_UNSEEN,
    **corruptions.MOTION,
    **corruptions.MOTION_UNSEEN,
}
REORDERING = ("stutter", "freeze", "shuffle", "swap", "hold", "rewind")


def moving_clip(frames=21, height=36, width=52):
    """A textured picture that pans by a pixel a frame, below and above which there is room for flicker."""
    rng = np.random.default_rng(1)
    picture = torch.from_numpy(rng.random((3, height, width + frames), dtype=np.float32))
    picture = torch.nn.functional.avg_pool2d(picture, 3, 1, 1) * 0.6 + 0.2
    return torch.stack([picture[:, :, t : t + width] for t in range(frames)])


@pytest.mark.parametrize("name", EVERY)
class TestEvery:
    def test_shape_range_and_repeatability(self, name):
        clip = moving_clip()
        before = clip.clone()
        corrupted = EVERY[name](clip, 1.0, np.random.default_rng(5))
        assert corrupted.shape == clip.shape
        assert corrupted.dtype == torch.float32
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        assert torch.equal(clip, before)
        assert torch.equal(corrupted, EVERY[name](clip, 1.0, np.random.default_rng(5)))

    def test_stronger_changes_more(self, name):
        clip = moving_clip()

        def change(strength):
            versions = [EVERY[name](clip, strength, np.random.default_rng(seed)) for seed in range(8)]
            return torch.stack([(v - clip).abs().mean() for v in versions]).mean()

        assert 0 < change(0.3) < change(1.0)


@pytest.mark.parametrize("name", REORDERING)
def test_reordering_keeps_whole_frames(name):
    clip = moving_clip()
    corrupted = EVERY[name](clip, 1.0, np.random.default_rng(2))
    distance = (corrupted[:, None] - clip[None]).abs().amax((2, 3, 4))  # [T, T]
    assert torch.equal(distance.min(1).values, torch.zeros(len(clip)))


def test_a_frozen_clip_stands_still():
    clip = moving_clip()
    frozen = corruptions.freeze(clip, 1.0, np.random.default_rng(0))
    assert torch.equal(frozen[5:], frozen[5:6].expand_as(frozen[5:]))
    assert not torch.equal(clip[5:], clip[5:6].expand_as(clip[5:]))


def test_bleeding_keeps_brightness():
    clip = moving_clip(frames=3)
    bled = corruptions.bleed(clip, 1.0, np.random.default_rng(0))
    assert (bled.mean(1) - clip.mean(1)).abs().max() < 1e-5
    assert (bled - clip).abs().mean() > 0.01


def test_compression_without_loss_is_the_identity():
    """The cosine transform and its inverse cancel when the quantum is tiny."""
    clip = moving_clip(frames=3)
    assert (corruptions.compression(clip, 1e-5, np.random.default_rng(0)) - clip).abs().max() < 1e-4


def test_seen_and_unseen_kinds_are_disjoint():
    groups = [
        corruptions.VISUAL,
        corruptions.VISUAL_UNSEEN,
        corruptions.MOTION,
        corruptions.MOTION_UNSEEN,
    ]
    assert len(EVERY) == sum(map(len, groups))
    assert set(corruptions.MOTION) >= corruptions.NOT_NEUTRAL
