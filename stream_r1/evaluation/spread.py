"""How sure a figure of a set of videos is, and the difference of two: the jackknife over the videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Figure(NamedTuple):
    """A figure of N videos, and what it is without each of them in turn."""

    value: float
    without: tuple[float, ...]

    @classmethod
    def mean(cls, values: Sequence[float]) -> Figure:
        """The mean of one value a video, at least two."""
        total, count = sum(values), len(values)
        return cls(total / count, tuple((total - value) / (count - 1) for value in values))

    @property
    def spread(self) -> float:
        """Its standard error."""
        return standard_error(self.without)


def standard_error(without: Sequence[float]) -> float:
    """The jackknife's standard error, from values without each of N videos in turn (Efron, 1982).

    For a mean it is the usual one, the deviation over the root of N.
    """
    values = np.asarray(without, np.float64)
    return float(np.sqrt((len(values) - 1) * np.var(values)))
