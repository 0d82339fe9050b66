"""From a video to what Qwen2-VL's vision tower reads, differentiable all the way.

The model's own processor works on whole files and cuts the graph; these are its steps on tensors: choose
frames, resize, normalise, cut into patches. Sizes and order are those of Qwen2-VL (arXiv 2409.12191) and of
VideoAlign's reader.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Those of CLIP, an RGB channel each.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

MIN_FRAMES, MAX_FRAMES = 4, 768  # of a sampled video, as far as it has that many
_MAX_RATIO = 200


def choose_frames(total: int, *, video_fps: float, fps: float | None, multiple: int = 2) -> list[int]:
    """Which frames of a video to show, spread evenly from the first to the last; their number is even.

    Args:
        total: frames that there are, at least 1.
        video_fps: how many of them are a second.
        fps: how many a second to show; None: all, without the last if their number is odd.
        multiple: what the number of frames must be a multiple of (the model's temporal patch).

    Returns:
        Indices in ascending order. A video with fewer than `multiple` frames has its last one repeated.
    """
    if total < 1 or not video_fps > 0 or not (fps is None or fps > 0):
        raise ValueError(
            "choose_frames: expected total >= 1 and positive video_fps and fps, "
            f"got {total}, {video_fps} and {fps}"
        )
    if total < multiple:
        return [*range(total), *[total - 1] * (multiple - total)]
    whole = total // multiple * multiple
    if fps is None:
        return list(range(whole))
    most = min(MAX_FRAMES, whole)
    wanted = min(max(total / video_fps * fps, MIN_FRAMES), most)
    count = max(round(wanted / multiple) * multiple, multiple)
    # Rounded in float32 as VideoAlign does: a frame's index is at stake at halves.
    chosen: list[int] = torch.linspace(0, total - 1, count).round().long().tolist()
    return chosen


def fit_size(
    height: int, width: int, *, min_pixels: int, max_pixels: int, multiple: int = 28
) -> tuple[int, int]:
    """The size nearest to the video's whose sides are multiples and whose area is in the range.

    480 x 832 within 200 704 pixels, VideoReward's limit, gives 336 x 588.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > _MAX_RATIO * min(height, width):
        raise ValueError(
            f"fit_size: expected sides within a factor of {_MAX_RATIO} of each other, got {height} x {width}"
        )
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (
            max(multiple, math.floor(side / shrink / multiple) * multiple) for side in (height, width)
        )
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / multiple) * multiple for side in (height, width))
    return rows, columns


def resize(video: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, T, 3, H, W] in [0, 1] -> [B, T, 3, *size] in [0, 1]: bicubic, antialiased.

    Bicubic weights overshoot at edges and the values are held to [0, 1]. Their gradient is let through: white
    is white plus or minus a rounding error after the resize, and must not lose its gradient by chance.
    """
    if video.shape[-2:] != size:
        flat = F.interpolate(video.flatten(0, 1), size, mode="bicubic", antialias=True, align_corners=False)
        video = flat.unflatten(0, video.shape[:2])
    return video + (video.clamp(0, 1) - video).detach()


def normalise(video: Tensor) -> Tensor:
    """[B, T, 3, H, W] in [0, 1] -> the same in units of CLIP's mean and deviation."""
    mean, std = (video.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (video - mean) / std


def patchify(
    video: Tensor, *, patch: int = 14, frames: int = 2, merge: int = 2, misplaced: bool = False
) -> tuple[Tensor, tuple[int, int, int]]:
    """Cuts a video into patches, in the order in which the vision tower reads them.

    A patch is `frames` x `patch` x `patch` pixels. The tower merges `merge` x `merge` neighbours into one,
    and so they come one after the other: patch (t, r, c) has its place in (t, r // merge, c // merge,
    r % merge, c % merge), not in (t, r, c).

    Args:
        video: [B, T, C, H, W]; T is a multiple of `frames`, H and W of `patch * merge`.
        misplaced: reproduce published code, which takes the gradient of patch number i for that of the i-th
            patch in row-major order. Values are the same; only gradients go astray.

    Returns:
        patches [B, N, C * frames * patch * patch], and how many there are in time, rows and columns.
    """
    batch, total, channels, height, width = video.shape
    if total % frames or height % (patch * merge) or width % (patch * merge):
        raise ValueError(
            f"patchify: video: expected frames in multiples of {frames} and sides in multiples of "
            f"{patch * merge}, got {list(video.shape)}"
        )
    t, rows, columns = total // frames, height // patch, width // patch
    cells = video.reshape(batch, t, frames, channels, rows, patch, columns, patch)
    cells = cells.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, t * rows * columns, -1)  # row-major
    places = torch.arange(t * rows * columns, device=video.device)
    places = places.reshape(t, rows // merge, merge, columns // merge, merge).transpose(2, 3).flatten()
    grid = (t, rows, columns)
    if misplaced:
        return _Misplaced.apply(cells, places), grid
    return cells[:, places], grid


class _Misplaced(torch.autograd.Function):
    """Reorders values and forgets to reorder their gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, cells: Tensor, places: Tensor) -> Tensor:
        return cells[:, places]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
