"""What ops are held to where numbers are not finite, large or tiny, on any backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from every_op import OPS
from torch import Tensor
from torch.nn import functional

from stream_r1_kernels import cached_chunk_attention


def run(name: str, backend: str, inputs: list[Tensor], upstream: float = 1.0) -> list[Tensor]:
    """The result and the gradients of the inputs that have some, by a gradient of `upstream`s."""
    op = OPS[name]
    leaves = [x.detach().clone().requires_grad_(i < op.trained) for i, x in enumerate(inputs)]
    if not op.trained:
        with torch.no_grad():
            return [op.call(backend, *leaves)]
    out = op.call(backend, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves[: op.trained], torch.full_like(out, upstream))]


def kinds(x: Tensor) -> Tensor:
    """0: finite, 1: NaN, 2: infinite."""
    return x.isnan().int() + 2 * x.isinf().int()


def check_gradients_at_large_logits(backend: str, size: float, dtype: torch.dtype) -> None:
    """Scores far apart, and scores all near `size` and near each other: as exact as torch's own attention."""
    torch.manual_seed(0)
    spread = [size * torch.randn(1, 48, 2, 16), *(torch.randn(1, 48, 2, 16) for _ in range(2))]
    common = torch.randn(2, 16)
    near = [common * (4 * size / common.square().sum(-1, keepdim=True)), common + spread[1] / 100, spread[2]]
    upstream = torch.randn(1, 48, 2, 16).to(dtype)

    def gradients(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(attend(*leaves), leaves, grad))

    def by_torch(*inputs: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)

    for q, k, v in (spread, [near[0].expand_as(spread[0]), *near[1:]]):
        # on a grid on which scores are exact in float32: what is compared is what is made of them
        rounded = [q.round().to(dtype), ((16 * k).round() / 16).to(dtype), v.to(dtype)]
        exact = gradients(by_torch, [x.double() for x in rounded], upstream.double())
        theirs = gradients(by_torch, rounded, upstream)
        ours = gradients(lambda *x: cached_chunk_attention(*x, None, backend=backend), rounded, upstream)
        unit = torch.finfo(dtype).eps
        for a, b, c, factor in zip(ours, exact, theirs, (rounded[1], rounded[0], None), strict=True):
            allowed = 2 * (c - b).norm() + unit * b.norm()
            if factor is not None:  # products of `upstream` and values, about 4, cancel before it
                allowed += 4 * unit * factor.double().norm()
            assert (a - b).norm() <= allowed, (backend, (a - b).norm() / allowed)
