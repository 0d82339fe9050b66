"""What changes the weights of models that are trained."""

from __future__ import annotations

import torch
from torch import nn

from stream_r1.distill.run_state import trained
from stream_r1.distill.settings import OptimizerSettings


def make_adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW on all of a model that is to be trained."""
    return torch.optim.AdamW(
        trained(model).values(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
