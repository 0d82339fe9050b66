"""Frames in time: what is shown for a while each becomes so many frames a second."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

MAX_PIXELS = 1 << 28  # of all frames together that a file may be read into; 3.2 GB as float32

T = TypeVar("T")


@dataclass(frozen=True)
class Footage:
    """What was read of a moving picture.

    `frames` [T, 3, H, W] float32 in [0, 1] at `fps` frames a second; `total` frames that the file has at that
    rate, as far as it was read; `damage`: why it could not be read to its end, None if it was.
    """

    frames: Tensor
    fps: float
    total: int
    damage: str | None = None


class Shown(NamedTuple, Generic[T]):
    """A frame and the seconds, counted from the first frame, at which it is first and last seen."""

    frame: T
    begin: Fraction
    end: Fraction


def at_rate(
    shown: Iterable[Shown[T]],
    fps: Fraction,
    *,
    first: int | None = None,
    last: int | None = None,
    most: int,
    early: Fraction = Fraction(1, 1000),
    source: str,
) -> tuple[list[T], int]:
    """The frames that are seen at k / fps seconds, k from 0: they are dropped or repeated as it takes.

    Args:
        shown: in their order.
        fps: frames a second that are wanted.
        first, last: how many, from the beginning or at the end; None: all.
        most: more are refused.
        early: seconds by which a frame may come too late and still count: time stamps are rounded.
        source: the file, for the message.

    Returns:
        The frames, and how many there are in all as far as they were read.

    Raises:
        ValueError: more than `most`.
    """
    kept: deque[T] = deque(maxlen=last)
    total = 0
    for frame, begin, end in shown:
        place, total = total, max(total, math.ceil((end - early) * fps))
        count = total - max(place, math.ceil((begin - early) * fps))
        kept.extend(repeat(frame, min(count, most + 1)))
        if first is not None and len(kept) >= first:
            return list(kept)[:first], total
        if len(kept) > most:
            raise ValueError(
                f"{source}: expected at most {most} frames at {float(fps):g} a second (max_pixels), "
                "got more; cut it or raise max_pixels"
            )
    return list(kept), total


def check_area(height: int, width: int, max_pixels: int, source: str) -> None:
    """Refuses a frame of more pixels than may be read, before it is decoded."""
    if height * width > max_pixels:
        raise ValueError(
            f"{source}: expected at most {max_pixels} pixels (max_pixels), got {height} x {width}"
        )
