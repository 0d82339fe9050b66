"""What many passes of a student share: a prompt and timesteps, as its layers read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TextContext(NamedTuple):
    """A prompt as the student reads it: cross-attention keys and values of every layer, [B, L, H, D / H]."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @property
    def batch(self) -> int:
        return self.k[0].shape[0]

    def detach(self) -> TextContext:
        return TextContext(tuple(k.detach() for k in self.k), tuple(v.detach() for v in self.v))

    def expand(self, batch: int) -> TextContext:
        """One prompt for `batch` samples, without copying."""
        return TextContext(
            tuple(k.expand(batch, -1, -1, -1) for k in self.k),
            tuple(v.expand(batch, -1, -1, -1) for v in self.v),
        )

    def fitting(self, where: str, layers: int, batch: int) -> TextContext:
        """This one for `batch` samples; ValueError, beginning with `where`, if it is of another model."""
        if len(self.k) != layers or self.batch not in (1, batch):
            raise ValueError(
                f"{where}: text must have {layers} layers and batch 1 or {batch}, "
                f"got {len(self.k)} layers and batch {self.batch}"
            )
        return self if self.batch == batch else self.expand(batch)


class TimeContext(NamedTuple):
    """Timesteps as the student reads them: what every layer shifts, scales and gates by."""

    blocks: tuple[Tensor, ...]  # of every layer, [B, F, 6, D]; F may be 1
    head: Tensor  # shift and scale, [B, F, 2, D]

    def beside(self, frames: int, other: TimeContext, other_frames: int) -> TimeContext:
        """Of a chunk of `frames` with this one, followed by a chunk of `other_frames` with the other."""

        def join(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat((mine.expand(-1, frames, -1, -1), theirs.expand(-1, other_frames, -1, -1)), 1)

        blocks = tuple(join(*pair) for pair in zip(self.blocks, other.blocks, strict=True))
        return TimeContext(blocks, join(self.head, other.head))

    def check(self, where: str, layers: int, batch: int, frames: int) -> None:
        """Raises ValueError, beginning with `where`, if this is for another model or chunk."""
        if len(self.blocks) != layers or tuple(self.head.shape[:2]) not in ((batch, 1), (batch, frames)):
            raise ValueError(
                f"{where}: t must have {layers} layers, batch {batch} and 1 or {frames} frames, "
                f"got {len(self.blocks)} layers, batch and frames {list(self.head.shape[:2])}"
            )


def per_frame(where: str, t: Tensor, batch: int, frames: int) -> Tensor:
    """Timesteps [B] -> [B, 1] (one modulation for all frames), [B, F] stays.

    Raises ValueError, beginning with `where`, for another shape.
    """
    if t.shape == (batch,):
        return t.unsqueeze(1)
    if t.shape != (batch, frames):
        raise ValueError(f"{where}: t must be [{batch}] or [{batch}, {frames}], got {list(t.shape)}")
    return t
