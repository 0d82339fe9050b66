import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_integer, check_number


def _refuse_grad(op: str, name: str, value: Tensor) -> None:
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(f"{op}: {name}: weights are data and have no backward; pass {name}.detach()")


def check_region_saliency(pixel_grads: Tensor, latent_shape: Sequence[int]) -> None:
    op = "region_saliency"
    check_float_tensor(op, "pixel_grads", pixel_grads)
    if pixel_grads.dim() not in (5, 6):
        raise ValueError(
            f"{op}: pixel_grads: expected shape [M, B, T, 3, H, W] or [B, T, 3, H, W], "
            f"got {list(pixel_grads.shape)}"
        )
    if not isinstance(latent_shape, Sequence):
        raise TypeError(f"{op}: latent_shape: expected (F, h, w), got {latent_shape!r}")
    for size in latent_shape:
        check_integer(op, "latent_shape", size)
    if len(latent_shape) != 3 or min(latent_shape) < 1:
        raise ValueError(f"{op}: latent_shape: expected (F, h, w), each >= 1, got {tuple(latent_shape)}")
    frames, rows, columns = latent_shape
    pixel_frames, _, height, width = pixel_grads.shape[-4:]
    if frames == 1:
        causal = pixel_frames == 1
    else:
        causal = pixel_frames >= frames and (pixel_frames - 1) % (frames - 1) == 0
    if not causal:
        raise ValueError(
            f"{op}: latent_shape: expected T = 1 + k (F - 1) pixel frames for F = {frames} latent frames "
            f"(the first is coded alone), got T = {pixel_frames}"
        )
    if height == 0 or width == 0 or height % rows != 0 or width % columns != 0:
        raise ValueError(
            f"{op}: latent_shape: expected rows and columns that divide the picture of {height} x {width}, "
            f"got {rows} x {columns}"
        )
    _refuse_grad(op, "pixel_grads", pixel_grads)


def check_intra_weights(
    saliency: Tensor,
    scores: Tensor,
    temperature: float,
    floors: dict[str, float],
    strengths: dict[str, float],
) -> None:
    op = "intra_weights"
    check_float_tensor(op, "saliency", saliency)
    check_float_tensor(op, "scores", scores)
    if saliency.dim() != 5 or 0 in (saliency.shape[0], *saliency.shape[2:]):
        raise ValueError(f"{op}: saliency: expected shape [M, B, F, h, w], got {list(saliency.shape)}")
    axes, batch = saliency.shape[:2]
    if scores.dim() != 2 or scores.shape[0] != batch or scores.shape[1] != axes:
        raise ValueError(f"{op}: scores: expected shape [B, M] = [{batch}, {axes}], got {list(scores.shape)}")
    if scores.device != saliency.device:
        raise ValueError(f"{op}: scores: expected device {saliency.device} as saliency, got {scores.device}")
    check_number(op, "temperature", temperature, "a finite number > 0", lambda value: 0 < value < math.inf)
    for name, value in (floors | strengths).items():
        check_number(op, name, value, "a number in [0, 1]", lambda value: 0 <= value <= 1)
    _refuse_grad(op, "saliency", saliency)
    _refuse_grad(op, "scores", scores)
