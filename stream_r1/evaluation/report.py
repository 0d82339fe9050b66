"""What a figure means, and which way is better."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Measure(NamedTuple):
    """What a figure means."""

    better: Literal["lower", "higher", "near reference"]
    meaning: str


MEASURES: dict[str, Measure] = {
    "kid": Measure(
        "lower", "distance of the frames' contents from the reference's (KID, EfficientNet-lite2); 0 is equal"
    )
}
"""Figures of a set of videos; those of one video each are in `single.FIGURES`."""
