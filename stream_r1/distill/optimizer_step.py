"""An optimizer step of all micro-batches and ranks, and of updates that are not finite none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stream_r1.distill.ranks import Ranks
from stream_r1.distill.sharding import full_tensor
from stream_r1.distill.weighting import NOT_FINITE


class DivergedError(RuntimeError):
    """Too many updates in a row were not finite; on every rank at once."""


class OptimizerStep:
    """Steps a network's optimizers, once for all micro-batches and ranks, with clipped gradients.

    An update is skipped if anything in it is not finite.

    Args:
        name: of the network, in numbers and messages.
        optimizers: of its parameters.
        parameters: the same, in the order in which their norms are summed; None: the optimizers'.
        clip: largest norm of all gradients together.
        max_skipped: updates in a row that may be skipped; one more is a DivergedError.
        ranks: whose gradients are averaged; None: this process alone.
        skipped: updates in a row so far, by network; is kept up to date.
    """

    def __init__(
        self,
        name: str,
        *optimizers: torch.optim.Optimizer,
        clip: float,
        max_skipped: int = 0,
        parameters: Sequence[Tensor] | None = None,
        ranks: Ranks | None = None,
        skipped: dict[str, int] | None = None,
    ) -> None:
        self.name, self.optimizers = name, optimizers
        self.clip, self.max_skipped = clip, max_skipped
        self.parameters = parameters or [
            p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        self.ranks = ranks or Ranks()
        self.skipped = skipped if skipped is not None else {}

    def __call__(self, step: int, losses: list[Tensor], scalars: dict[str, float]) -> bool:
        """Whether the step was taken. Gradients are gone afterwards.

        Args:
            step: its number, from 1.
            losses: of the micro-batches.
            scalars: take the loss, the norm, the rate, and whether it was clipped or skipped.
        """
        name = self.name
        self.ranks.average_gradients(self.parameters)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        loss = self.ranks.mean(torch.stack(losses).mean())
        numbers = torch.stack([loss.float(), norm.float()])
        finite = not self.ranks.any(not torch.isfinite(numbers).all())
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # its narrow copies are of the weights before
        scalars[f"{name}/loss"], scalars[f"{name}/grad_norm"] = numbers.tolist()
        scalars[f"{name}/lr"] = self.optimizers[0].param_groups[0]["lr"]
        scalars[f"{name}/clipped"] = float(numbers[1] > self.clip)
        scalars[f"{name}/skipped"] = float(not finite)
        self.skipped[name] = 0 if finite else self.skipped.get(name, 0) + 1
        if self.skipped[name] > self.max_skipped:
            raise DivergedError(self._diverged(step, scalars))
        return finite

    def _diverged(self, step: int, scalars: dict[str, float]) -> str:
        name, count = self.name, self.skipped[self.name]
        what = f"{count} updates of the {name} in a row were" if count > 1 else f"an update of the {name} was"
        told = f"loss {scalars[f'{name}/loss']:g}, gradient norm {scalars[f'{name}/grad_norm']:g}"
        advice = "lower its lr and start again"
        if name == "student" and scalars.get(NOT_FINITE):
            told += f", {scalars[NOT_FINITE]:.0%} of the reward's scores not finite"
            advice = "look at the reward"
        return (
            f"{what} not finite, at step {step} ({told}), max_skipped is {self.max_skipped}: "
            f"{advice}; the last checkpoint, if any, is from before"
        )
