"""Pixels: floating point in [0, 1] in everything that takes them; their luma, detail and chroma."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_LEAST, _MOST = -0.5, 1.5  # not a little beyond the range, as resizing and decoding leave it, but another one


def check_range(pixels: Tensor, name: str, *, finite: bool = False) -> None:
    """Refuses pixels of another range, as [-1, 1] or [0, 255].

    One pass over them; on a GPU the one wait for its result. Not looked at: integers, what holds no values
    (meta and fake tensors) and what is being compiled or captured in a CUDA graph.

    Args:
        pixels: any shape.
        name: function and parameter, for the message.
        finite: refuse what is not a number, too.

    Raises:
        ValueError: another range; the message has the one that came.
    """
    if pixels.numel() == 0 or not pixels.is_floating_point() or _is_without_values(pixels):
        return
    check_least_and_most(least_and_most(pixels), name, finite=finite)


def least_and_most(pixels: Tensor) -> Tensor:
    """[2]: the least and the largest value, on the pixels' device; both NaN where one of them is."""
    return torch.stack(pixels.detach().aminmax())


def check_least_and_most(ends: Tensor, name: str, *, finite: bool = False) -> None:
    """`check_range` of pixels whose `least_and_most` are known."""
    least, most = ends.tolist()
    if least < _LEAST or most > _MOST or (finite and least != least):
        raise ValueError(f"{name}: expected values in [0, 1], got {least:g} to {most:g}")


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels of any shape in [0, 1], clamped, in 256 steps, halves to the even one: uint8 on their device.

    To be called before a copy to the CPU, so that a quarter of the bytes leave a GPU. uint8 stays as it is.
    """
    pixels = pixels.detach()
    return (
        pixels if pixels.dtype == torch.uint8 else (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    )


def luma(frames: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., H, W] in the frames' dtype (BT.601 weights)."""
    red, green, blue = frames.unbind(-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def laplacian(luma: Tensor) -> Tensor:
    """[..., H, W] -> [..., H - 2, W - 2]: four times a pixel, less its four neighbours."""
    inner = luma[..., 1:-1, 1:-1]
    return 4 * inner - luma[..., :-2, 1:-1] - luma[..., 2:, 1:-1] - luma[..., 1:-1, :-2] - luma[..., 1:-1, 2:]


def chroma(frames: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., H, W]: the largest less the smallest of a pixel's three colours."""
    return frames.amax(-3) - frames.amin(-3)


def _is_without_values(pixels: Tensor) -> bool:
    if torch.compiler.is_compiling() or pixels.is_meta or isinstance(pixels, FakeTensor):
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(pixels):
        return True
    return pixels.is_cuda and torch.cuda.is_current_stream_capturing()
