"""Muon: momentum whose update is orthogonalised, for matrices and convolution kernels.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the update scale of
Liu et al., arXiv 2502.16982, equation 4: the same learning rate serves AdamW and Muon parameters.
``torch.optim.Muon`` takes matrices only; convolution kernels are flattened to ``[out, in * kernel]`` here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix to ``[rows, columns]``, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(Optimizer):
    """Muon for parameters of two or more dimensions.

    Args:
        params: parameters, each ``[out, ...]``.
        lr: learning rate, on AdamW's scale.
        momentum: Nesterov momentum in [0, 1).
        weight_decay: decoupled, per unit of ``lr``.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                flat = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = orthogonalise(flat) * (0.2 * max(flat.shape) ** 0.5)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"])
