"""region_saliency and intra_weights: run on real tensors, against float64."""

import exact
import pytest
import torch
from machine import Machine

from stream_r1_kernels.saliency.reference import intra_weights_reference, region_saliency_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("axes", "batch", "frames", "factor", "channels", "cells", "cell"),
    [
        (1, 1, 1, 4, 3, (1, 1), (1, 1)),
        (2, 2, 3, 4, 3, (3, 5), (8, 8)),
        (1, 2, 2, 2, 1, (2, 3), (3, 5)),
        (1, 1, 2, 1, 4, (1, 150), (2, 8)),  # wider than a block at once
    ],
)
def test_region_saliency(
    machine: Machine,
    axes: int,
    batch: int,
    frames: int,
    factor: int,
    channels: int,
    cells: tuple[int, int],
    cell: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    size = (1 + factor * (frames - 1), channels, cells[0] * cell[0], cells[1] * cell[1])
    grads = torch.randn(batch, axes, *size).to(dtype).transpose(0, 1)
    ours = machine.run("region_saliency", grads, frames, *cells)
    true = region_saliency_reference(grads.double(), frames, *cells)
    exact.assert_close(ours, true, region_saliency_reference(grads, frames, *cells))


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("axes", "batch", "frames", "rows", "columns"), [(1, 1, 1, 1, 1), (3, 2, 4, 5, 7), (2, 1, 3, 60, 104)]
)
def test_intra_weights(
    machine: Machine, axes: int, batch: int, frames: int, rows: int, columns: int, use: tuple[bool, bool]
) -> None:
    torch.manual_seed(0)
    saliency, scores = torch.rand(axes, batch, frames, rows, columns) * 1e-3, torch.randn(batch, axes)
    settings = (0.7, 0.15, 0.2, 0.9, 1.0, *use)
    ours = machine.run("intra_weights", saliency, scores, *settings)
    true = intra_weights_reference(saliency.double(), scores.double(), *settings)
    exact.assert_close(ours, true, intra_weights_reference(saliency, scores, *settings))
    torch.testing.assert_close(ours.mean((1, 2, 3, 4)), torch.ones(batch), rtol=1e-5, atol=0)


def test_flat_and_not_finite_saliency(machine: Machine) -> None:
    torch.manual_seed(0)
    saliency = torch.rand(1, 3, 2, 6, 6)
    saliency[:, 0] = 3.0  # constant: ones
    saliency[0, 1, 1, 2, 3] = float("nan")  # NaN throughout the sample
    scores = torch.randn(3, 1)
    settings = (1.0, 0.15, 0.2, 1.0, 1.0, True, True)
    ours = machine.run("intra_weights", saliency, scores, *settings)
    torch.testing.assert_close(ours[0], torch.ones_like(ours[0]))
    assert ours[1].isnan().all()
    torch.testing.assert_close(ours, intra_weights_reference(saliency, scores, *settings), equal_nan=True)


def test_the_order_of_warps_does_not_matter(machine: Machine) -> None:
    torch.manual_seed(0)
    saliency, scores = torch.rand(2, 1, 2, 60, 104), torch.randn(1, 2)
    call = ("intra_weights", saliency, scores, 1.0, 0.15, 0.2, 1.0, 1.0, True, True)
    results = [machine.run(*call, seed=seed) for seed in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
