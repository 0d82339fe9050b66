"""Ways to spoil a clip, after what few-step generators get wrong; the small reward learns to mark them down.

A corruption is a function `(clip, strength, rng) -> clip`: clip [T, 3, H, W] float32 in [0, 1] (a clip of
another range is refused), strength in (0, 1], all randomness from `rng`. With equally seeded `rng`s two
strengths spoil the clip in the same way, one more than the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stream_r1.pixels import check_range

Corruption = Callable[[Tensor, float, np.random.Generator], Tensor]


def _of_pixels(corruption: Corruption) -> Corruption:
    @wraps(corruption)
    def checked(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
        check_range(clip, f"{corruption.__name__}: clip")
        return corruption(clip, strength, rng)

    return checked


# Visual quality: each frame is worse, time is left as it was.


@_of_pixels
def blur(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Gaussian blur, up to 1.6 - 2.6 pixels."""
    return _gaussian(clip, strength * rng.uniform(1.6, 2.6))


@_of_pixels
def pixelate(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Flat blocks, mixed into the clip."""
    size = int(rng.choice([2, 4, 8]))
    blocks = F.interpolate(F.avg_pool2d(clip, size, ceil_mode=True), scale_factor=size)[
        ..., : clip.shape[2], : clip.shape[3]
    ]
    return torch.lerp(clip, blocks, {2: 1.0, 4: 0.8, 8: 0.6}[size] * strength)


@_of_pixels
def noise(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """White noise, fresh in every frame or fixed to the screen."""
    fixed = rng.random() < 0.5
    deviation = strength * rng.uniform(0.06, 0.15)
    pattern = _normal(rng, (1 if fixed else clip.shape[0], *clip.shape[1:]))
    return (clip + deviation * pattern).clamp(0, 1)


@_of_pixels
def blotches(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Soft colour stains that stay in place: latent noise that was not removed."""
    coarse = _normal(rng, (1, 3, *(max(2, side // int(rng.choice([6, 10]))) for side in clip.shape[2:])))
    stains = F.interpolate(coarse, clip.shape[2:], mode="bicubic", align_corners=False)
    return (clip + strength * rng.uniform(0.1, 0.2) * stains).clamp(0, 1)


@_of_pixels
def compression(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Coarsely quantised 8 x 8 cosine coefficients."""
    step = strength * rng.uniform(0.25, 0.6)
    transform = _cosine_basis(8)
    height, width = clip.shape[2:]
    padded = F.pad(clip, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [T, 3, H/8, W/8, 8, 8]
    coefficients = transform @ (blocks - 0.5) @ transform.T
    frequency = torch.arange(8).view(8, 1) + torch.arange(8)
    quantum = step * (0.25 + 0.25 * frequency)
    coefficients = (coefficients / quantum).round() * quantum
    restored = (transform.T @ coefficients @ transform + 0.5).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return restored[..., :height, :width].clamp(0, 1)


@_of_pixels
def colour_shift(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """A cast, and contrast and saturation that are too high or too low."""
    cast = torch.tensor(rng.uniform(-0.2, 0.2, 3), dtype=clip.dtype).view(3, 1, 1)
    contrast, saturation = (1 + strength * rng.choice([-0.45, 0.7]) * rng.uniform(0.6, 1) for _ in range(2))
    grey = clip.mean(1, keepdim=True)
    coloured = grey + saturation * (clip - grey)
    return ((coloured - 0.5) * contrast + 0.5 + strength * cast).clamp(0, 1)


@_of_pixels
def posterise(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Few levels a channel: 3 to 5 at full strength."""
    levels = round(rng.integers(3, 6) / strength) - 1
    return (clip * levels).round() / levels


@_of_pixels
def seams(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Every latent cell (8 x 8 pixels) a little brighter or darker than it should be."""
    cells = _normal(rng, (1, 3, -(-clip.shape[2] // 8), -(-clip.shape[3] // 8)))
    offsets = F.interpolate(cells, scale_factor=8)[..., : clip.shape[2], : clip.shape[3]]
    return (clip + strength * rng.uniform(0.04, 0.1) * offsets).clamp(0, 1)


@_of_pixels
def smear(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Blur along one direction only."""
    length = 2 * round(strength * rng.integers(3, 6)) + 1
    kernel = torch.full((3, 1, 1, length), 1 / length)
    sideways = rng.random() < 0.5
    x = clip if sideways else clip.transpose(2, 3)
    x = F.conv2d(F.pad(x, (length // 2, length // 2, 0, 0), mode="replicate"), kernel, groups=3)
    return x if sideways else x.transpose(2, 3)


@_of_pixels
def oversharpen(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Halos around edges."""
    return (clip + strength * rng.uniform(1.5, 3.0) * (clip - _gaussian(clip, 1.2))).clamp(0, 1)


@_of_pixels
def bleed(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Colour runs over edges that brightness keeps."""
    grey = clip.mean(1, keepdim=True)
    colour = _gaussian(clip - grey, strength * rng.uniform(4.0, 8.0))
    return (grey + colour).clamp(0, 1)


# Motion quality: each frame is a good picture (but for ghosts), time is wrong.


@_of_pixels
def stutter(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Frames are held for 2 to 5 frames, then time jumps on."""
    hold = 1 + round(strength * rng.integers(2, 5))
    offset = int(rng.integers(hold))
    index = (np.arange(len(clip)) + offset) // hold * hold - offset
    return clip[index.clip(0)]


@_of_pixels
def freeze(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """The picture stands still from some frame on: at full strength from one of the first few."""
    moving = max(1, round((1 - strength * rng.uniform(0.8, 1.0)) * len(clip)))
    return clip[np.arange(len(clip)).clip(0, moving - 1)]


@_of_pixels
def shuffle(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Frames change places with frames nearby, up to the whole clip's length away."""
    reach = max(1.5, strength * rng.uniform(4, len(clip)))
    return clip[np.argsort(np.arange(len(clip)) + rng.uniform(0, reach, len(clip)))]


@_of_pixels
def jitter(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """The camera shakes by fractions of a pixel to some pixels."""
    offsets = strength * rng.uniform(1.0, 4.0) * _normal(rng, (len(clip), 1, 1, 2)).clamp(-2, 2)
    return _displace(clip, offsets.expand(-1, *clip.shape[2:], -1))


@_of_pixels
def flicker(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness changes from frame to frame."""
    gains = 1 + strength * rng.uniform(0.1, 0.3) * _normal(rng, (len(clip), 1, 1, 1)).clamp(-2, 2)
    return (clip * gains).clamp(0, 1)


@_of_pixels
def ghost(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Every frame is mixed with the frames before it."""
    length = min(len(clip), 1 + round(strength * rng.integers(4, 9)))
    padded = torch.cat([clip[:1].expand(length - 1, -1, -1, -1), clip])
    return torch.stack([padded[shift : shift + len(clip)] for shift in range(length)]).mean(0)


@_of_pixels
def wobble(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Shapes breathe: a smooth displacement field that is drawn again every few frames."""
    keys = -(-len(clip) // int(rng.integers(1, 4))) + 1
    field = _normal(rng, (1, 2, keys, 4, 7))
    field = F.interpolate(field, (len(clip), *clip.shape[2:]), mode="trilinear", align_corners=True)
    return _displace(clip, strength * rng.uniform(1.5, 4.0) * field[0].permute(1, 2, 3, 0))


@_of_pixels
def swap(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Neighbouring frames change places."""
    index = np.arange(len(clip))
    for start in range(int(rng.integers(2)), len(clip) - 1, 2):
        if rng.random() < strength:
            index[start : start + 2] = index[start : start + 2][::-1]
    return clip[index]


@_of_pixels
def hold(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Time stops for a while, then catches up at once."""
    length = max(3, round(strength * rng.integers(8, 15)))
    start = int(rng.integers(0, max(1, len(clip) - length)))
    index = np.arange(len(clip))
    index[start : start + length] = start
    return clip[index.clip(0, len(clip) - 1)]


@_of_pixels
def rewind(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Time jumps back every few frames and runs the same way again."""
    period = int(rng.integers(3, 6))
    back = max(1, round(strength * (period - 1)))
    index, now = list[int](), 0
    while len(index) < len(clip):
        index += range(now, now + period)
        now += period - back
    return clip[np.array(index[: len(clip)]).clip(0, len(clip) - 1)]


@_of_pixels
def colour_drift(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """The colour balance wanders from frame to frame."""
    offsets = strength * rng.uniform(0.05, 0.12) * _normal(rng, (len(clip), 3, 1, 1)).clamp(-2, 2)
    return (clip + offsets).clamp(0, 1)


VISUAL = {f.__name__: f for f in (blur, oversharpen, pixelate, noise, blotches, compression, colour_shift)}
VISUAL_UNSEEN = {f.__name__: f for f in (posterise, seams, smear, bleed)}
MOTION = {f.__name__: f for f in (stutter, freeze, shuffle, jitter, flicker, ghost, wobble)}
MOTION_UNSEEN = {f.__name__: f for f in (swap, hold, rewind, colour_drift)}

NOT_NEUTRAL = frozenset({"ghost", "wobble"})
"""Motion corruptions that also change the single frame: visual quality is free to mind them."""


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _gaussian(clip: Tensor, sigma: float) -> Tensor:
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(clip, (radius, radius, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel.transpose(2, 3), groups=3)


def _cosine_basis(size: int) -> Tensor:
    """The orthonormal DCT-II matrix [size, size]."""
    row, column = torch.arange(size).view(-1, 1), torch.arange(size) + 0.5
    basis = torch.cos(torch.pi / size * row * column) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def _displace(clip: Tensor, offsets: Tensor) -> Tensor:
    """Samples the clip at pixel positions moved by offsets [T, H, W, 2] (x, y in pixels)."""
    height, width = clip.shape[2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    size = torch.tensor([2 / (width - 1), 2 / (height - 1)])
    grid = torch.stack([x, y], -1) + offsets * size
    return F.grid_sample(clip, grid, mode="bicubic", padding_mode="border", align_corners=True).clamp(0, 1)
