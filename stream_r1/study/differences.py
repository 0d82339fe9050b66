"""Arms compared in pairs: the same seed, the same noise, the same prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_DRAWS = 4000


class Difference(NamedTuple):
    """Of an arm from the arm it is compared with, in one figure.

    mean: over seeds and videos. low, high: of its 95 % interval. seeds: the mean difference of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(
    arm: Mapping[int, NDArray[np.float64]], against: Mapping[int, NDArray[np.float64]], *, seed: int = 0
) -> Difference | None:
    """Paired difference of two arms: the numbers of each seed, [videos], in the same order.

    The interval is a bootstrap in two levels: seeds are drawn with replacement, then the videos of each. With
    few seeds it is too narrow at the level of seeds, which is why the seeds' own differences are given too.
    Numbers that are not finite leave out their pair. None: no seed in common, or no pair left.
    """
    pairs = []
    for key in sorted(arm.keys() & against.keys()):
        a, b = arm[key], against[key]
        if a.shape != b.shape or a.ndim != 1:
            raise ValueError(
                f"difference: arm: expected as many numbers as against has for seed {key}, "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        change = a - b
        pairs.append(change[np.isfinite(change)])
    pairs = [change for change in pairs if len(change)]
    if not pairs:
        return None
    rng = np.random.default_rng(seed)
    means = np.stack(  # [seeds, draws]: each seed's mean over videos drawn with replacement
        [change[rng.integers(len(change), size=(_DRAWS, len(change)))].mean(1) for change in pairs]
    )
    chosen = rng.integers(len(pairs), size=(_DRAWS, len(pairs)))  # the seeds of each draw
    drawn = means[chosen, np.arange(_DRAWS)[:, None]].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    each = tuple(float(change.mean()) for change in pairs)
    return Difference(float(np.mean(each)), float(low), float(high), each)
