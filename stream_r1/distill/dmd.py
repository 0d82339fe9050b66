"""Distribution matching: which way to move the student's videos to make their distribution the teacher's.

Two bidirectional models look at the student's noised video: the frozen teacher, with guidance, says what
real videos are like there, the critic, trained on the student's own videos, says what the student's are
like. Source: DMD2 (2405.14867), CausVid (2412.07772, eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stream_r1.distill.weighting import Weights
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule
from stream_r1_kernels import dmd_loss


def velocity(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """A bidirectional model's v [B, F, C, h, w], in x's dtype.

    Args:
        model: diffusers' `WanTransformer3DModel`, or our `CausalWanTransformer` (with every frame visible).
        x: [B, F, C, h, w] at timesteps t [B], text embeddings [B, L, D].
    """
    dtype = next(model.parameters()).dtype
    if isinstance(model, CausalWanTransformer):
        return model(x.to(dtype), t, text.to(dtype), mask=None).to(x.dtype)
    v = model(x.transpose(1, 2).to(dtype), t, text.to(dtype), return_dict=False)[0]
    return v.transpose(1, 2).to(x.dtype)


def as_own(model: nn.Module, text_len: int) -> CausalWanTransformer:
    """A bidirectional model as our class, whose passes processes can share: the same weights, names and v.

    Args:
        model: diffusers' `WanTransformer3DModel`, or ours, which is given back.
        text_len: of the embeddings that it will be given.
    """
    if isinstance(model, CausalWanTransformer):
        return model
    with torch.device("meta"):
        own: CausalWanTransformer = CausalWanTransformer.from_config(model.config, text_len=text_len)
    own.load_state_dict(model.state_dict(), assign=True)
    return own


class DistributionMatching:
    """The generator's and the critic's losses.

    Args:
        teacher: frozen; every frame sees every other.
        critic: a copy of the teacher that learns.
        negative: [1, L, D], the text embedding that guidance moves away from.
        guidance_scale: s of x0 = uncond + s (cond - uncond); 1 is no guidance. The paper's w is s - 1.
    """

    def __init__(
        self,
        teacher: nn.Module,
        critic: nn.Module,
        negative: Tensor,
        *,
        schedule: FlowSchedule,
        guidance_scale: float = 4.0,
    ) -> None:
        self.teacher = teacher
        self.critic = critic
        self.negative = negative
        self.schedule = schedule
        self.guidance = guidance_scale - 1  # w of x0 = cond + w (cond - uncond)

    def real_x0(self, x_t: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's x0 with the text and with the negative (None without guidance)."""
        if self.guidance == 0:
            return self._x0(self.teacher, x_t, t, text), None
        negative = self.negative.to(text).expand_as(text)
        both = self._x0(self.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, negative]))
        cond, uncond = both.chunk(2)
        return cond, uncond

    def fake_x0(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The critic's x0 with the text."""
        return self._x0(self.critic, x_t, t, text)

    def loss(
        self,
        x: Tensor,
        text: Tensor,
        t: Tensor,
        eps: Tensor,
        weights: Weights | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """The (weighted) distribution-matching loss of the student's x0.

        Args:
            x: [B, F, C, h, w], the rollout, with a graph.
            text: [B, L, D] embeddings.
            t, eps: timesteps [B] and noise like x at which the scores are compared.
            weights: None for plain DMD.
            loss_mask: bool that broadcasts to x: where it is False the loss does not look; None: everywhere.

        Returns:
            A scalar. NaN, without a gradient, where x or what a model says of it is not finite: `dmd_loss`
            would take such elements for 0.
        """
        with torch.no_grad():
            x_t = self.schedule.add_noise(x.detach(), eps, self.schedule.sigma(t))
            cond, uncond = self.real_x0(x_t, t, text)
            fake = self.fake_x0(x_t, t, text)
        return self.loss_between(x, cond, uncond, fake, weights, loss_mask)

    def loss_between(
        self,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        fake: Tensor,
        weights: Weights | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """`loss` of what `real_x0` and `fake_x0` gave."""
        inter, intra = (weights.inter, weights.intra) if weights is not None else (None, None)
        loss = dmd_loss(
            x, fake, cond, uncond, guidance=self.guidance, w_inter=inter, w_intra=intra, mask=loss_mask
        )
        seen = [each.detach().isfinite().all() for each in (x, fake, cond, uncond) if each is not None]
        return torch.where(torch.stack(seen).all(), loss, torch.nan)

    def critic_loss(self, x: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Flow matching of the critic on the student's videos x: mean (v - (eps - x))^2."""
        x_t = self.schedule.add_noise(x, eps, self.schedule.sigma(t))
        v = velocity(self.critic, x_t, t, text)
        return (v - self.schedule.velocity(x, eps)).square().mean()

    def _x0(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.schedule.x0_from_v(x_t, velocity(model, x_t, t, text), self.schedule.sigma(t))
