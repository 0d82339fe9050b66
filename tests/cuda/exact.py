"""What the ops have to compute, in float64 from the references, and how close they have to come."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(ours: Tensor, exact: Tensor, same_dtype: Tensor, units: int = 1) -> None:
    """The largest error is at most twice that of torch at the same dtype, plus `units` in the last place.

    Args:
        ours: what the kernel made, its dtype the op's.
        exact: the same in float64.
        same_dtype: the same by torch in the op's dtype.
        units: more than one for a single number, of which torch's own error may be next to nothing by luck.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == same_dtype.dtype
    if exact.numel() == 0:
        return
    assert torch.equal(ours.isnan(), exact.isnan()), "NaN where a number was expected, or the other way round"
    infinite = exact.isinf()
    assert torch.equal(ours.double()[infinite], exact[infinite])
    finite = exact.isfinite()
    error = (ours.double() - exact)[finite].abs()
    theirs = (same_dtype.double() - exact)[finite].abs()
    largest = exact[finite].abs().max().item() if finite.any() else 0.0
    allowed = 2 * theirs.max().item() + units * torch.finfo(ours.dtype).eps * largest if finite.any() else 0.0
    worst = error.max().item() if finite.any() else 0.0
    assert worst <= allowed, (
        f"error {worst:.3g}, allowed {allowed:.3g} (torch at {ours.dtype}: {theirs.max().item():.3g})"
    )
