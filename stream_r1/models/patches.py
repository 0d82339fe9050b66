"""Latents as tokens, a patch of a frame each.

Shapes: B batch, F latent frames, C channels, T tokens (T = F * rows * columns), D the transformer's width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from stream_r1.models.module_weights import is_plain
from stream_r1.models.sequence import TokenShare


def patch_grid(where: str, height: int, width: int, patch: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the tokens of a latent frame; `patch` is (1, rows, columns).

    Raises ValueError, beginning with `where`, for a size that patches do not fill.
    """
    _, patch_rows, patch_columns = patch
    if height % patch_rows or width % patch_columns or height < 1 or width < 1:
        raise ValueError(
            f"{where}: latent height and width must be multiples of the patch "
            f"{patch_rows} x {patch_columns}, got {height} x {width}"
        )
    return height // patch_rows, width // patch_columns


def token_grid(where: str, x: Tensor, channels: int, patch: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Batch, frames, and rows and columns of the tokens of latents [B, F, `channels`, h, w].

    Raises ValueError, beginning with `where`, for another shape.
    """
    if x.ndim != 5 or x.shape[2] != channels:
        raise ValueError(f"{where}: x must be [B, F, {channels}, h, w], got {list(x.shape)}")
    return x.shape[0], x.shape[1], *patch_grid(where, x.shape[3], x.shape[4], patch)


def patchify(x: Tensor, embedding: nn.Conv3d, share: TokenShare | None = None) -> Tensor:
    """[B, F, C, h, w] -> tokens [B, T, D]: the patch convolution as one matmul; of `share`, the own ones."""
    x = x.to(embedding.weight.dtype)
    if not is_plain(embedding):
        h = embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
        return h if share is None else share.own(h)
    _, patch_rows, patch_columns = embedding.kernel_size
    x = x.unflatten(4, (-1, patch_columns)).unflatten(3, (-1, patch_rows))
    patches = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, T, C * patch]
    if share is not None:
        patches = share.own(patches)
    return functional.linear(patches, embedding.weight.flatten(1), embedding.bias)


def unpatchify(patches: Tensor, patch: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """[B, T, patch * C] -> [B, F, C, h, w]."""
    patches = patches.unflatten(2, (*patch[1:], -1)).unflatten(1, (-1, rows, columns))
    return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
