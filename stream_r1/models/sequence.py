"""A transformer's sequence over several processes: each has some tokens of every frame, and attends with some
of the heads.

    linear layers, norms, gates    all heads of its part of the tokens    [B, T / N, H, D]
    attention, cache               all tokens of its part of the heads    [B, T, H / N, D]

An all-to-all leads from the one to the other and another back, for a rank's tokens hold a part for every
rank's heads. The tokens of every frame are divided, not the frames: a chunk has fewer frames than there may
be ranks, and what belongs to a frame (timestep, place in the cache) stays with it.
Source: DeepSpeed-Ulysses (2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceParallel:
    """The processes that share every sequence, and this one's place among them.

    Every rank is given the same latents, timesteps and text, and computes the same from what `whole` gives.
    A weight's gradient on a rank is then what the rank's own tokens give it, times the number of ranks: the
    mean over ranks, which is what training takes anyway, is the gradient.

    Args:
        group: a process group; None: the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def check_heads(self, where: str, heads: int) -> None:
        """Raises ValueError, beginning with `where`, for heads that the ranks can't share evenly."""
        if heads % self.size:
            raise ValueError(
                f"{where}: num_attention_heads must be a multiple of the {self.size} processes of the "
                f"sequence, got {heads}"
            )

    def divide(self, where: str, rows: int, columns: int) -> TokenShare:
        """How frames of rows x columns tokens are shared.

        Raises ValueError, beginning with `where`, where the ranks can't share them evenly.
        """
        if rows * columns % self.size:
            raise ValueError(
                f"{where}: the tokens of a frame must be a multiple of the {self.size} processes of the "
                f"sequence, got {rows} x {columns} = {rows * columns}"
            )
        return TokenShare(self, rows * columns // self.size)

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [N, ...], a part for every rank -> [N, ...], a part of every rank."""
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """x [...] -> [N, ...], that of every rank."""
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x, group=self.group)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x; x is overwritten."""
        dist.all_reduce(x, group=self.group)
        return x


class SampleShare:
    """Samples that the ranks of a sequence have in common, for work that can't be shared by tokens.

    Each rank does some of them, the first rank the first ones. What it gives to the others is data.

    Args:
        samples: their number.
        sequence: None: one process, which does all of them.

    `own` is the slice of this rank, `idle` says that it is empty.
    """

    def __init__(self, samples: int, sequence: SequenceParallel | None) -> None:
        rank, size = (0, 1) if sequence is None else (sequence.rank, sequence.size)
        each = -(-samples // size)
        self.own = slice(min(rank * each, samples), min((rank + 1) * each, samples))
        self.idle = self.own.start == self.own.stop
        self._sequence = sequence

    def gathered(self, part: Tensor | None, like: Tensor, *shape: int, dim: int = 0) -> Tensor:
        """Every rank's part, one after the other along `dim`.

        Args:
            part: of this rank's samples; None where it is idle.
            like: of the result's dtype and device.
            shape: of the whole.
        """
        if self._sequence is None:
            assert part is not None
            return part
        whole = like.new_zeros(shape)
        if part is not None:
            whole.narrow(dim, self.own.start, self.own.stop - self.own.start).copy_(part)
        return self._sequence.all_reduce(whole)  # zeros of all ranks but one


class TokenShare:
    """What a rank has of frames of a certain size. F frames have T tokens, T = F * N * `tokens`.

    tokens: of a frame, on each rank.
    """

    def __init__(self, sequence: SequenceParallel, tokens: int) -> None:
        self.sequence, self.tokens = sequence, tokens

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of all: dimension `dim` is T and becomes T / N."""
        return _Own.apply(x, self, dim)

    def whole(self, x: Tensor) -> Tensor:
        """[B, T / N, C] of this rank -> [B, T, C] of all of them."""
        return _Whole.apply(x, self)

    def by_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """[B, T / N, H, D] each, with all heads -> [B, T, H / N, D] each, with all tokens; in one message."""
        size = self.sequence.size
        sent = torch.stack([part.unflatten(2, (size, -1)).movedim(2, 0) for part in parts], dim=1)
        got = _AllToAll.apply(sent, self.sequence)  # [N, parts, B, T / N, H / N, D]
        by_frame = got.unflatten(3, (-1, self.tokens)).movedim(0, 3)
        return by_frame.flatten(2, 4).unbind(0)

    def by_tokens(self, x: Tensor) -> Tensor:
        """[B, T, H / N, D], with all tokens -> [B, T / N, H, D], with all heads."""
        by_rank = x.unflatten(1, (-1, self.sequence.size, self.tokens)).movedim(2, 0)
        got = _AllToAll.apply(by_rank.contiguous(), self.sequence)  # [N, B, F, tokens, H / N, D]
        return got.movedim(0, 3).flatten(3, 4).flatten(1, 2)

    def slice_of(self, x: Tensor, dim: int) -> Tensor:
        by_rank = x.unflatten(dim, (-1, self.sequence.size, self.tokens))
        return by_rank.select(dim + 1, self.sequence.rank).flatten(dim, dim + 1)

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        parts = self.sequence.all_gather(x.contiguous()).unflatten(dim + 1, (-1, self.tokens))
        return parts.movedim(0, dim + 1).flatten(dim, dim + 2)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        return sequence.all_to_all(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.sequence.all_to_all(grad.contiguous()), None


class _Own(torch.autograd.Function):
    """A rank's gradient is of its own tokens, and N times as large: see `SequenceParallel`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: TokenShare, dim: int) -> Tensor:
        ctx.share, ctx.dim = share, dim
        return share.slice_of(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.share.gathered(grad, ctx.dim) / ctx.share.sequence.size, None, None


class _Whole(torch.autograd.Function):
    """What follows is the same on every rank, and so is its gradient: nothing has to be fetched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: TokenShare) -> Tensor:
        ctx.share = share
        return share.gathered(x, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.share.slice_of(grad, 1) * ctx.share.sequence.size, None
