"""What ops are held to where numbers are not finite, large or tiny, on any backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from every_op import OPS
from torch import Tensor
from torch.nn import functional

from stream_r1_kernels import cached_chunk_attention, dmd_loss, region_saliency

Running = Callable[[str], AbstractContextManager[None]]


def here(backend: str) -> AbstractContextManager[None]:
    """Where the backend needs nothing around it."""
    return nullcontext()


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


def check_float16(
    name: str, backend: str, size: float, upstreams: tuple[float, ...], running: Running
) -> None:
    """Forward and backward, by gradients as a scaled loss has them; each input large or tiny in turn."""
    for place in [None, *range(len(OPS[name].draw(2, torch.float16)))]:
        for upstream in upstreams if OPS[name].trained else (1.0,):
            inputs = OPS[name].draw(2, torch.float16)
            for i in range(len(inputs)):
                if place in (None, i):
                    inputs[i] = (inputs[i].double() * size).clamp(-6e4, 6e4).to(inputs[i].dtype)
            exact = run(name, "reference", [x.double() for x in inputs], upstream)
            with running(backend):
                ours = run(name, backend, inputs, upstream)
            for part, (a, b) in enumerate(zip(ours, exact, strict=True)):
                reachable = b.abs() < 0.99 * torch.finfo(a.dtype).max
                assert a[reachable].isfinite().all(), (place, upstream, part, a, b)
                if part == 0:  # what is finite is right, not cut off
                    scale = b[reachable].abs().max().item() if reachable.any() else 0.0
                    error = (a.double() - b)[reachable].abs()
                    assert (error <= 0.02 * scale + 1e-6).all(), (place, upstream, a, b)


def check_width(name: str, backend: str, width: int, dtype: torch.dtype, running: Running) -> None:
    inputs = OPS[name].draw(width, dtype)
    exact, same = run(name, "reference", [x.double() for x in inputs]), run(name, "reference", inputs)
    with running(backend):
        ours = run(name, backend, inputs)
    for a, b, c in zip(ours, exact, same, strict=True):
        unit = torch.finfo(dtype).eps
        allowed = 2 * (c - b).abs().max().item() + 16 * unit
        torch.testing.assert_close(a.double(), b, rtol=2 * unit, atol=allowed)


def check_infinitely_low_scores(
    backend: str, low: int, rest: int, dtype: torch.dtype, running: Running
) -> None:
    """`low` keys with scores of -inf before `rest` others count as nothing; alone they give zeros."""
    q, v = torch.ones(1, 3, 1, 2, dtype=dtype), torch.randn(1, low + rest, 1, 2).to(dtype)
    k = torch.cat([torch.full((1, low, 1, 2), -math.inf), torch.zeros(1, rest, 1, 2)], 1).to(dtype)
    with running(backend), torch.no_grad():
        out, lse = cached_chunk_attention(q, k, v, None, return_lse=True, backend=backend)
        none, lowest = cached_chunk_attention(
            q, k[:, :low], v[:, :low], None, return_lse=True, backend=backend
        )
    mean = v[:, low:].float().mean(1, keepdim=True).expand_as(out)
    near = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(out.float(), mean, rtol=near, atol=near)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(rest)))
    assert (none == 0).all()
    assert (lowest == -math.inf).all()


def check_direction_beyond_float16(backend: str, side: int, running: Running) -> None:
    """The loss of videos whose normaliser is about 1e-7 of the distance to the critic, and its gradient."""
    torch.manual_seed(0)
    real = torch.randn(2, 2, 16, side, side).half()
    x, fake = real.clone(), real + torch.randn_like(real) / 2
    x[:, 0, 0, 0, 0] += 0.01
    weights = {"w_intra": torch.rand(2, 2, 1, side, side) * 1e3, "w_inter": torch.tensor([1e-3, 1e3])}

    def gradient(dtype: torch.dtype, backend: str, scale: float) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        loss = dmd_loss(leaf, fake.to(dtype), real.to(dtype), **weights, backend=backend)
        return [loss.detach().double(), torch.autograd.grad(scale * loss, leaf)[0].double()]

    for scale in (1e-3, 1e-8):
        exact = gradient(torch.float64, "reference", scale)
        with running(backend):
            got = gradient(torch.float16, backend, scale)
        torch.testing.assert_close(got[0], exact[0], rtol=1e-4, atol=0)
        reachable = exact[1].abs() < 6e4
        torch.testing.assert_close(got[1][reachable], exact[1][reachable], rtol=2e-3, atol=1e-7)


def check_squares_beyond_range(backend: str, size: float, dtype: torch.dtype, running: Running) -> None:
    torch.manual_seed(0)
    grads = (torch.randn(1, 1, 5, 3, 4, 50) * size).to(dtype)
    grads[..., 3] = 0
    with running(backend):
        saliency = region_saliency(grads, (2, 1, 25), backend=backend)
    exact = region_saliency(grads.double(), (2, 1, 25), backend="reference")
    torch.testing.assert_close((saliency / size).double(), exact / size, rtol=1e-5, atol=1e-5)
