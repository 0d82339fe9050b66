"""Teacher forcing: a causal student learns data, each noisy chunk seeing the clean chunks before it.

Source: CausVid (2412.07772), Self Forcing (2506.08009, section 3.1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stream_r1.distill.initialise import per_chunk
from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.ode import StoredTrajectories
from stream_r1.models.prompt_cache import PromptEmbeddings
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule


class TeacherForcing:
    """Flow matching of latents over [clean | noisy], with a timestep a chunk; an objective for `InitTrainer`.

    Args:
        latents: [N, F, C, h, w] of the data, any floating dtype; used in float32. Those of a teacher can stay
            in their files.
        text: [N, L, D] embeddings; or [P, L, D] with `text_index`.
        text_index: [N], which text each sample has.
        steps: unshifted timesteps to learn at, as (1000, 750, 500, 250); "all" learns at all 1000.
        clean: False leaves the clean half out and lets noisy chunks see noisy chunks (diffusion forcing).
    """

    def __init__(
        self,
        latents: Tensor | StoredTrajectories,
        text: Tensor | PromptEmbeddings,
        text_index: Tensor | None = None,
        *,
        schedule: FlowSchedule,
        steps: tuple[float, ...] | Literal["all"] = "all",
        clean: bool = True,
    ) -> None:
        index = torch.arange(len(text)) if text_index is None else text_index
        if len(latents.shape) != 5 or len(text.shape) != 3 or index.shape != (len(latents),):
            raise ValueError(
                "TeacherForcing: expected latents [N, F, C, h, w], text [P, L, D] and text_index [N], "
                f"got {list(latents.shape)}, {list(text.shape)} and {list(index.shape)}"
            )
        self.latents, self.text, self.text_index = latents, text, index
        grid = range(1, 1001) if steps == "all" else sorted(steps)
        self.timesteps = torch.tensor([schedule.warp(float(t)) for t in grid])
        self.schedule = schedule
        self.clean = clean

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> torch.Size:
        """[F, C, h, w] of a sample."""
        return self.latents.shape[1:]

    def loss(self, student: CausalWanTransformer, indices: list[int], noise: SampleNoise) -> Tensor:
        """mean (v - (eps - x0))^2 with a random timestep a chunk."""
        x0 = self.latents[indices].to(noise.device, torch.float32)
        text = self.text[self.text_index[indices]].to(noise.device, torch.float32)
        frames = x0.shape[1]
        t = per_chunk(
            self.timesteps.to(noise.device)[noise.randint(len(self.timesteps), frames)], student, frames
        )
        eps = noise.randn_like(x0)
        x_t = self.schedule.add_noise(x0, eps, self.schedule.sigma(t))
        v = student(x_t, t, text, mask="causal", clean_x=x0 if self.clean else None)
        return (v - self.schedule.velocity(x0, eps)).square().mean()
