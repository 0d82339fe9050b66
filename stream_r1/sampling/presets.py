"""How published students stream: what their weights do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """How a student streams.

    The first six are settings of `CausalWanTransformer`; steps are timesteps before the schedule's shift.
    """

    positions: str
    window_frames: int | None
    sink_frames: int = 0
    sink_ema: float | None = None
    frames_per_chunk: int = 3
    first_chunk_frames: int | None = None
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0

    @property
    def student(self) -> dict[str, Any]:
        """The settings of the student."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "shift")}


# Sources: Self Forcing (2506.08009), whose cache holds 21 frames; Reward Forcing (2512.04678); Stream-R1
# (2605.03849), which streams as Reward Forcing does.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "stream-r1": Preset("window", window_frames=9, sink_frames=3, sink_ema=0.999),
        "reward-forcing": Preset("window", window_frames=9, sink_frames=3, sink_ema=0.999),
        "self-forcing": Preset("absolute", window_frames=21),
    }
)
DEFAULT_PRESET = "stream-r1"


def choose_preset(name: str | None, config: Mapping[str, Any]) -> Preset | None:
    """The preset of this name; without a name the default, or None where `config` says itself how to stream.

    Raises:
        ValueError: no such preset.
    """
    if name is None:
        return None if "frames_per_chunk" in config else PRESETS[DEFAULT_PRESET]
    if name not in PRESETS:
        raise ValueError(f"from_pretrained: preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
