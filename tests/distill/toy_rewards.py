"""Small rewards with known gradients, for tests of what only needs a reward to follow the protocol."""

import torch
from torch import Tensor


class PatchReward:
    """Looks at one patch of one latent frame's pixel frames; every other pixel is free of influence."""

    axes = ("VQ", "MQ", "TA")

    def __init__(self, frames: slice, rows: slice, columns: slice) -> None:
        self.region = (slice(None), frames, slice(None), rows, columns)

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        patch = video[self.region]
        brightness = patch.mean(dim=(1, 2, 3, 4))
        contrast = patch.flatten(1).var(dim=1)
        length = torch.tensor([len(prompt) / 10 for prompt in prompts], dtype=video.dtype)
        return torch.stack([brightness, contrast, length * brightness], dim=1)


class SmoothReward:
    """Three smooth functions of the whole video: brightness, stillness, redness where the prompt says red."""

    axes = ("VQ", "MQ", "TA")

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        quality = -(video - 0.5).square().mean(dim=(1, 2, 3, 4)) * 4
        stillness = -video.diff(dim=1).square().mean(dim=(1, 2, 3, 4)) * 4
        red = (video[:, :, 0] - video[:, :, 1:].mean(dim=2)).tanh().mean(dim=(1, 2, 3))
        wanted = torch.tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts], dtype=video.dtype)
        return torch.stack([quality, stillness, wanted * red], dim=1)


class FlatReward:
    """Every pixel counts the same: its saliency is uniform, its scores are zero."""

    axes = ("VQ", "MQ", "TA")

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        mean = video.mean(dim=2).flatten(1).sum(dim=1)
        return (mean - mean.detach())[:, None].expand(-1, 3)
