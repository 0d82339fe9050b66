"""Shapes and dtypes of the compiled saliency ops, for tracing."""

import torch
from torch import Tensor

from ..registration import register_fake


@register_fake("region_saliency")
def _(pixel_grads: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    return pixel_grads.new_empty((*pixel_grads.shape[:2], frames, rows, columns), dtype=torch.float32)


@register_fake("intra_weights")
def _(saliency: Tensor, *_: object) -> Tensor:
    _axes, batch, frames, rows, columns = saliency.shape
    return saliency.new_empty((batch, frames, 1, rows, columns), dtype=torch.float32)
