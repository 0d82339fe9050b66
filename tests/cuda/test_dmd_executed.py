"""dmd_loss, its backward and dmd_gradient_: run on real tensors, against float64."""

import exact
import pytest
import torch
from machine import Machine
from torch import Tensor

from stream_r1_kernels.dmd.reference import dmd_gradient_reference_, dmd_loss_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 4, 5, 7),
    (2, 2, 3, 8, 16),
    (1, 3, 2, 96, 128),
]  # the last: several blocks a sample


def weights_of(kind: str, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(w_intra, w_inter, mask)"""
    batch, frames, _, rows, columns = shape
    if kind == "none":
        return None, None, None
    intra = (
        torch.rand(batch, frames, 1, rows, columns) + 0.5
        if kind == "cells"
        else torch.rand(1, frames, 1, 1, 1)
    )
    mask = (
        torch.rand(batch, frames, 1, rows, columns) > 0.4
        if kind == "cells"
        else torch.ones(shape[0], frames, 1, 1, 1).bool()
    )
    if kind == "frames" and frames > 1:
        mask[:, 1:] = False
    return intra, torch.rand(batch) + 0.5, mask


def predictions(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(shape).to(dtype)
    fake = (
        torch.randn(shape[0], shape[2], shape[1], *shape[3:]).to(dtype).transpose(1, 2)
    )  # frames and channels swapped
    return [x, fake, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]


def double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


@pytest.mark.parametrize("kind", ["none", "cells", "frames"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(machine: Machine, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    x, fake, cond, uncond = predictions(shape, dtype)
    weights = weights_of(kind, shape)
    negative = uncond if kind != "frames" else None
    loss, direction, factor = machine.run("dmd_loss", x, fake, cond, negative, 3.0, *weights)
    grad = machine.run("dmd_loss_backward", torch.tensor(2.0), direction, factor)

    def reference(kind: torch.dtype | None) -> tuple[Tensor, Tensor]:
        tensors = [t if t is None or kind is None else t.double() for t in (x, fake, cond, negative)]
        leaf = tensors[0].detach().requires_grad_()
        value = dmd_loss_reference(
            leaf, *tensors[1:], 3.0, *(w if kind is None else double(w) for w in weights)
        )
        return value.detach(), torch.autograd.grad(2 * value, leaf)[0]

    true, same = reference(torch.float64), reference(None)
    exact.assert_close(loss, true[0], same[0], units=4)
    exact.assert_close(grad, true[1], same[1])

    for buffer_dtype in {dtype, torch.float32}:
        start = torch.randn(shape).to(buffer_dtype)
        buffer, expected, same_dtype = start.clone(), start.double(), start.clone()
        machine.run("dmd_gradient_", buffer, x, fake, cond, negative, 3.0, *weights, 0.5)
        doubles = [double(t) for t in (x, fake, cond, negative)]
        dmd_gradient_reference_(expected, *doubles, 3.0, *(double(w) for w in weights), 0.5)
        dmd_gradient_reference_(same_dtype, x, fake, cond, negative, 3.0, *weights, 0.5)
        exact.assert_close(buffer, expected, same_dtype)


def test_what_is_not_finite_counts_as_zero(machine: Machine) -> None:
    torch.manual_seed(0)
    x, fake, cond, _ = predictions((3, 2, 2, 4, 4), torch.float32)
    fake[0, 0, 0, 1, 2] = float("nan")
    x[1] = cond[1]  # the normaliser is 0
    cond[2, 0, 0, 0, 0] = float("inf")
    loss, direction, factor = machine.run("dmd_loss", x, fake, cond, None, 0.0, None, None, None)
    expected = dmd_loss_reference(x, fake, cond, None, 0.0, None, None, None)
    torch.testing.assert_close(loss, expected)
    assert direction.isfinite().all()
    assert factor.isfinite().all()
    assert not direction[1:].any()


def test_a_sample_that_keeps_nothing(machine: Machine) -> None:
    torch.manual_seed(0)
    x, fake, cond, uncond = predictions((2, 2, 1, 3, 3), torch.float32)
    mask = torch.tensor([True, False])[:, None, None, None, None]
    loss, direction, factor = machine.run("dmd_loss", x, fake, cond, uncond, 3.0, None, None, mask)
    torch.testing.assert_close(loss, dmd_loss_reference(x, fake, cond, uncond, 3.0, None, None, mask))
    grad = machine.run("dmd_loss_backward", torch.tensor(2.0), direction, factor)
    assert grad[0].any()
    assert not grad[1].any()


def test_an_empty_batch(machine: Machine) -> None:
    empty = torch.randn(0, 2, 3, 4, 4)
    loss, direction, _ = machine.run("dmd_loss", empty, empty, empty, None, 0.0, None, None, None)
    assert loss == 0
    assert direction.shape == empty.shape
    machine.run("dmd_gradient_", empty.clone(), empty, empty, empty, None, 0.0, None, None, None, 1.0)


def test_the_order_of_warps_does_not_matter(machine: Machine) -> None:
    torch.manual_seed(0)
    x, fake, cond, uncond = predictions((2, 3, 2, 64, 64), torch.bfloat16)
    results = [
        machine.run("dmd_loss", x, fake, cond, uncond, 3.0, None, None, None, seed=seed) for seed in range(3)
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
