"""The public rotary function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_eps, check_float_tensor, check_integer, check_tensor, count_write
from ..backends import resolve
from ..registration import kernels
from .reference import norm_rotary

_OP = "qk_norm_rotary"


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    k_out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k over the full width, head split and interleaved-pair rotary, all in one pass.

    Forward and backward.

    Args:
        q, k: `[B, T, H * D]`, last dimension contiguous, other strides free (slices of one fused projection).
        q_weight, k_weight: `[H * D]`, any floating-point dtype.
        cos, sin: float32 `[T, D / 2]`, as RotaryGrid.phases gives them; must not require grad.
        num_heads: H.
        eps: added to the mean square, >= 0.
        k_out: `[B, T, H, D]` in k's dtype, last dimension contiguous: where the rotated keys go, e.g. a slot
            of a cache. Sampling only: with gradients enabled, an input that requires grad is refused.

    Returns:
        q and k, `[B, T, H, D]` in q's dtype; k is `k_out` if that was given. The norm is in float32.

    Raises:
        ValueError: shapes that do not fit, or gradients that would be lost.
        TypeError: dtypes that do not fit.
        RuntimeError: a backend that can't be used here.
    """
    _check(q, k, q_weight, k_weight, cos, sin, num_heads, k_out)
    check_eps(_OP, eps)
    if torch.is_grad_enabled():
        _refuse_gradients((q, k, q_weight, k_weight), cos=cos, sin=sin, k_out=k_out)
    if resolve(backend, _OP, q) == "reference":
        rotated_q = norm_rotary(q, q_weight, cos, sin, num_heads, eps)
        rotated_k = norm_rotary(k, k_weight, cos, sin, num_heads, eps)
        return rotated_q, rotated_k if k_out is None else k_out.copy_(rotated_k)
    ops, arguments = kernels(q, k, q_weight, k_weight), (q, k, q_weight, k_weight, cos, sin, num_heads, eps)
    if k_out is not None and not torch.compiler.is_compiling():
        rotated_q = ops.qk_norm_rotary_into.default(*arguments, k_out)
        count_write(k_out)
        return rotated_q, k_out
    rotated_q, rotated_k = ops.qk_norm_rotary.default(*arguments)
    # In a graph the keys are copied: of a view the op might be given the wrong part (see graphs.py).
    return rotated_q, rotated_k if k_out is None else k_out.copy_(rotated_k)


def _refuse_gradients(trained: tuple[Tensor, ...], **others: Tensor | None) -> None:
    """Where they would be lost: of others always, of what is trained where keys go to a buffer."""
    for name, value in others.items():
        if value is not None and value.requires_grad:
            raise ValueError(
                f"{_OP}: {name}: expected a tensor that does not require grad, as it gets none; pass "
                f"{name}.detach(), or use torch.no_grad()"
            )
    if others["k_out"] is not None and any(x.requires_grad for x in trained):
        raise ValueError(
            f"{_OP}: k_out: expected None where q, k or a weight requires grad, got a buffer: the keys in it "
            "would carry no gradient. Leave it out, or use torch.no_grad()"
        )


def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    k_out: Tensor | None,
) -> None:
    check_float_tensor(_OP, "q", q)
    if q.dim() != 3:
        raise ValueError(f"{_OP}: q: expected [B, T, H * D], got shape {tuple(q.shape)}")
    check_integer(_OP, "num_heads", num_heads)
    batch, tokens, width = q.shape
    if num_heads < 1 or width % (2 * num_heads):
        raise ValueError(
            f"{_OP}: num_heads: expected a number of heads of even width in {width} channels, got {num_heads}"
        )
    head = width // num_heads
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, tokens, width)),
        "q_weight": (q_weight, (width,)),
        "k_weight": (k_weight, (width,)),
        "cos": (cos, (tokens, head // 2)),
        "sin": (sin, (tokens, head // 2)),
        "k_out": (k_out, (batch, tokens, num_heads, head)),
    }
    for name, (given, expected) in shapes.items():
        if given is None and name == "k_out":
            continue
        check_tensor(_OP, name, given)
        assert given is not None
        if given.shape != expected:
            raise ValueError(f"{_OP}: {name}: expected shape {expected}, got {tuple(given.shape)}")
        if given.device != q.device:
            raise ValueError(f"{_OP}: {name}: expected device {q.device} as q, got {given.device}")
    for name, given in (("k", k), ("k_out", k_out)):
        if given is not None and given.dtype != q.dtype:
            raise TypeError(f"{_OP}: {name}: expected {q.dtype} as q, got {given.dtype}")
    for name, given in (("q_weight", q_weight), ("k_weight", k_weight), ("cos", cos), ("sin", sin)):
        if not given.is_floating_point():
            raise TypeError(f"{_OP}: {name}: expected a floating-point dtype, got {given.dtype}")
