"""What one GPU does in a step, and with which networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stream_r1.distill.settings import DistillSettings
from stream_r1.estimate.devices import Device
from stream_r1.estimate.networks import Network, Networks
from stream_r1.recipe import InitRecipe, Recipe

Role = Literal["student", "teacher", "critic"]


@dataclass(frozen=True)
class Plan:
    """What one GPU does.

    Attributes:
        samples: that it sees at once.
        half: matrix products are in bfloat16.
        narrow: weights are gathered in bfloat16.
        keeps_gradients: they stay whole, and come as the graph goes; else they are counted elsewhere.
        device: the GPU; None: a CPU, without what ops need on a GPU alone.
    """

    recipe: Recipe | InitRecipe
    networks: Networks
    samples: int
    half: bool
    narrow: bool
    keeps_gradients: bool
    device: Device | None

    @property
    def sequence(self) -> int:
        """GPUs that share the samples."""
        return self.recipe.distributed.sequence

    @property
    def on_gpu(self) -> bool:
        return self.device is not None

    @property
    def capability(self) -> tuple[int, int] | None:
        """By which ops pick what runs."""
        return None if self.device is None else self.device.capability

    @property
    def settings(self) -> DistillSettings:
        assert isinstance(self.recipe, Recipe)
        return self.recipe

    @property
    def latents(self) -> tuple[int, int, int, int, int]:
        size = self.recipe.rollout
        channels = self.networks.student.config.get("in_channels", 16)
        return (self.samples, size.frames, channels, size.height, size.width)

    @property
    def chunks(self) -> int:
        """Of a rollout that is learnt from."""
        config, frames = self.networks.student.config, self.recipe.rollout.frames
        chunk = config.get("frames_per_chunk", 3)
        return 1 + (frames - (config.get("first_chunk_frames") or chunk)) // chunk


def roles(plan: Plan) -> dict[Role, Network]:
    """The transformers of a step."""
    n = plan.networks
    roles: dict[Role, Network | None] = {"student": n.student, "teacher": n.teacher, "critic": n.critic}
    return {role: network for role, network in roles.items() if network is not None}
