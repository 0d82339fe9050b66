import torch
from torch import Tensor

from ..arguments import count_write
from ..backends import resolve
from ..registration import RECORDED, kernels
from .reference import dmd_gradient_reference_, dmd_loss_reference
from .validation import check_buffer, check_dmd


def dmd_loss(
    x: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor | None = None,
    *,
    guidance: float = 3.0,
    w_intra: Tensor | None = None,
    w_inter: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weighted distribution-matching loss (DMD2, arXiv 2405.14867; weights: Stream-R1, arXiv 2605.03849).

        real = real_cond + guidance (real_cond - real_uncond)            real_cond alone without real_uncond
        g    = (fake - real) / mean |x - real|                           the mean over the whole sample
        loss = mean_b [ w_inter_b / 2 * mean_kept( w_intra_b * (x - sg(x - g))^2 ) ]

    so dL/dx = w_inter w_intra g / (B * kept) on the kept elements. An element of g that is not finite counts
    as 0: neither a NaN of one network nor x == real spoils the step. The gradient is made in the forward; the
    backward only scales it.

    Args:
        x: [B, F, C, h, w], the student's x0; float32, bfloat16, float16 or float64. Only x has a gradient.
        fake, real_cond, real_uncond: x0-predictions of the critic and of the teacher, x's shape and dtype.
        guidance: w above; a conventional guidance scale minus 1.
        w_intra: weights of the cells, float32 or float64, 5 dimensions that broadcast to x, such as
            `intra_weights`' [B, F, 1, h, w].
        w_inter: [B] weights of the samples, float32 or float64.
        mask: bool, 5 dimensions that broadcast to x ([B, F, 1, 1, 1] keeps frames). Elements where it is
            False get no gradient, and the inner mean counts the kept elements of each sample only (as if the
            rest were cut away; a sample that keeps none adds 0). The normaliser of g stays the mean over the
            whole sample, and w_intra is not normalised again. All True is the same as no mask.
        backend: "auto", "cpu", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        A scalar, float32 (float64 for float64 x); 0 for an empty batch.

    Raises:
        ValueError: a shape that does not fit, or a tensor other than x requires grad.
        TypeError: a dtype that is not allowed.
    """
    check_dmd("dmd_loss", x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask)
    if resolve(backend, "dmd_loss", x) == "reference":
        return dmd_loss_reference(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask)
    op = kernels(x).dmd_loss.default
    return op(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask)[0]


def dmd_gradient_(
    buffer: Tensor,
    x: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor | None = None,
    *,
    guidance: float = 3.0,
    w_intra: Tensor | None = None,
    w_inter: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Adds scale * d dmd_loss / dx to `buffer` in place and returns it: no loss, no graph, no second buffer.

    Arguments are those of `dmd_loss`; the result is a constant for autograd, so x may require grad.

    Args:
        buffer: [B, F, C, h, w], any strides; x's dtype or float32; must not require grad (x.grad is fine).
        scale: factor, for instance 1 / number of micro-steps.

    Raises:
        ValueError, TypeError: as `dmd_loss`; a buffer that does not fit.
    """
    check_dmd("dmd_gradient_", x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask)
    check_buffer("dmd_gradient_", buffer, x, scale)
    inputs = (x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask, scale)
    if resolve(backend, "dmd_gradient_", x) == "reference":
        dmd_gradient_reference_(buffer, *inputs)
    elif torch.compiler.is_compiling():
        # In a graph a copy is written to: of a view the op might be given the wrong part (see graphs.py).
        copy = buffer.clone()
        RECORDED.dmd_gradient_.default(copy, *inputs)
        return buffer.copy_(copy)
    else:
        kernels(buffer).dmd_gradient_.default(buffer, *inputs)  # a constant for autograd: x may require grad
    count_write(buffer)
    return buffer
