"""Stream-R1's weights for a DMD loss, usable in anybody's loop.

A video reward with several axes says two things about a rollout: how much to trust it as a whole
(inter-reliability, one number a sample) and where the reward would change if pixels did (intra-perplexity,
one number a latent cell).

    weights = StreamR1Weights(reward, beta=2.0)
    w = weights(video, prompts, latent_shape)                 # w.inter [B], w.intra [B, F, 1, h, w], w.log
    loss = dmd_loss(x, fake, real_cond, real_uncond, guidance=3.0, w_inter=w.inter, w_intra=w.intra)

Source: Stream-R1 (2605.03849); the inter weight alone, on motion quality, is Re-DMD of
Reward Forcing (2512.04678).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stream_r1.rewards.base import Reward, check_video
from stream_r1_kernels import intra_weights, region_saliency

NOT_FINITE = "scores/not_finite"
"""In the log: the share of the batch with a score that is infinite or not a number."""
_ROUNDING = 1e-5  # relative; of a float32 sum over a frame

WeightingMode = Literal["uniform", "re-dmd", "spatial", "temporal", "no-balance", "full"]


@dataclass(frozen=True)
class _Parts:
    """Which parts of the weighting a mode uses."""

    inter: Literal["none", "motion", "mean"]
    balance: bool
    spatial: bool
    temporal: bool

    @property
    def intra(self) -> bool:
        return self.spatial or self.temporal


_MODES: dict[str, _Parts] = {
    "uniform": _Parts(inter="none", balance=False, spatial=False, temporal=False),
    "re-dmd": _Parts(inter="motion", balance=False, spatial=False, temporal=False),
    "spatial": _Parts(inter="mean", balance=True, spatial=True, temporal=False),
    "temporal": _Parts(inter="mean", balance=True, spatial=False, temporal=True),
    "no-balance": _Parts(inter="mean", balance=False, spatial=True, temporal=True),
    "full": _Parts(inter="mean", balance=True, spatial=True, temporal=True),
}


class Weights(NamedTuple):
    """What a batch of videos is worth to the loss. Everything is detached and float32.

    A score that is infinite or not a number counts as none: it is NaN, and so is the weight of its sample
    where the mode uses it, for the caller to skip the update.
    """

    inter: Tensor  # [B], positive
    intra: Tensor  # [B, F, 1, h, w], mean 1 a sample
    scores: Tensor  # [B, axes]
    saliency: Tensor | None  # [axes, B, F, h, w], None when the mode does not look at pixels
    log: dict[str, float]


class AxisBalance:
    """How unevenly a reward's axes have been rising: the penalty P of Stream-R1.

    Keeps the last `window` mean scores, one entry an update. P is the unbiased standard deviation over the
    axes of (mean of the recent half - mean of the older half); 0 until the window is full. One entry an
    update, not one a sample, makes P independent of the batch's size and order; over several ranks,
    `observe` the gathered scores.
    """

    def __init__(self, axes: int, window: int = 50) -> None:
        if window < 2:
            raise ValueError(f"AxisBalance: window must be at least 2, got {window}")
        self.axes = axes
        self.window = window
        self._history: deque[list[float]] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._history)

    def observe(self, scores: Tensor) -> None:
        """Adds one update's scores [B, axes], of all ranks. Scores that are not finite are left out."""
        if scores.dim() != 2 or scores.shape[1] != self.axes:
            raise ValueError(f"AxisBalance: scores must be [B, {self.axes}], got {list(scores.shape)}")
        finite = scores.detach()[torch.isfinite(scores).all(dim=1)]
        if len(finite):
            self._history.append(finite.double().mean(dim=0).tolist())

    def penalty(self) -> float:
        """P >= 0, in units of the scores."""
        if len(self._history) < self.window or self.axes < 2:
            return 0.0
        history = torch.tensor(list(self._history), dtype=torch.float64)  # [window, axes], oldest first
        half = self.window // 2
        rise = history[-half:].mean(dim=0) - history[:-half].mean(dim=0)
        return rise.std(correction=1).item()

    def state_dict(self) -> dict[str, Any]:
        return {"window": self.window, "axes": self.axes, "history": [list(entry) for entry in self._history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["window"] != self.window or state["axes"] != self.axes:
            raise ValueError(
                f"AxisBalance: state is for window {state['window']} and {state['axes']} axes, "
                f"expected window {self.window} and {self.axes} axes"
            )
        self._history = deque((list(map(float, entry)) for entry in state["history"]), maxlen=self.window)


class StreamR1Weights:
    """Turns decoded videos and a reward into the weights of a DMD loss.

    Args:
        reward: anything with `axes` and a `score(video, prompts)` differentiable in the video, whose samples
            do not influence one another.
        mode: what to use of it.
            "uniform": weights of 1, plain DMD; scores are only reported.
            "re-dmd": inter weight from the motion axis alone, without balance (Reward Forcing).
            "spatial", "temporal": "full" with only that part of the intra weight.
            "no-balance": "full" without the balance penalty.
            "full": Stream-R1.
        beta: W_inter = exp(beta * (mean of the axes - balance * P)).
        balance: lambda, the strength of the balance penalty P (see AxisBalance).
        history: updates that P looks back on; it is 0 before.
        temperature: T of the softmax over axes; a weaker axis gets more of the saliency, more so with a
            lower T.
        spatial_floor, temporal_floor: the part of a weight that saliency cannot take away, in units of the
            peak.
        spatial_strength, temporal_strength: a_s and a_t, how far weights move away from uniform; in [0, 1].
        log_bound: |beta * r| is held to this; None leaves it free, as published. The default lets ordinary
            scores (of unit variance) through, and `log["inter/bounded"]` says for what share of the batch it
            acted.
        motion_axis: the axis that "re-dmd" reads.
        samples_at_once: how many samples the reward sees at a time (memory); None for all.

    Source: Stream-R1 (2605.03849).
    """

    def __init__(
        self,
        reward: Reward,
        mode: WeightingMode = "full",
        *,
        beta: float = 2.0,
        balance: float = 0.5,
        history: int = 50,
        temperature: float = 1.0,
        spatial_floor: float = 0.15,
        temporal_floor: float = 0.2,
        spatial_strength: float = 1.0,
        temporal_strength: float = 1.0,
        log_bound: float | None = 8.0,
        motion_axis: str = "MQ",
        samples_at_once: int | None = None,
    ) -> None:
        if mode not in _MODES:
            raise ValueError(
                f"StreamR1Weights: mode must be one of {list(get_args(WeightingMode))}, got {mode!r}"
            )
        if log_bound is not None and not log_bound > 0:
            raise ValueError(f"StreamR1Weights: log_bound must be positive or None, got {log_bound}")
        if samples_at_once is not None and samples_at_once < 1:
            raise ValueError(
                f"StreamR1Weights: samples_at_once must be positive or None, got {samples_at_once}"
            )
        if not isinstance(reward, Reward):
            got = type(reward).__name__
            raise TypeError(f"StreamR1Weights: reward must have axes and score(video, prompts), got {got}")
        self.reward = reward
        self.axes = tuple(reward.axes)
        self.mode = mode
        self._parts = _MODES[mode]
        if self._parts.inter == "motion" and motion_axis not in self.axes:
            raise ValueError(
                f"StreamR1Weights: motion_axis must be one of the reward's {list(self.axes)} "
                f"in mode 're-dmd', got {motion_axis!r}"
            )
        self.beta = beta
        self.balance = balance
        self.log_bound = log_bound
        self.motion_axis = motion_axis
        self.samples_at_once = samples_at_once
        self._intra_options: dict[str, Any] = {
            "temperature": temperature,
            "spatial_floor": spatial_floor,
            "temporal_floor": temporal_floor,
            "spatial_strength": spatial_strength,
            "temporal_strength": temporal_strength,
            "use_spatial": self._parts.spatial,
            "use_temporal": self._parts.temporal,
        }
        self.history = AxisBalance(len(self.axes), history)

    def __call__(
        self,
        video: Tensor,
        prompts: Sequence[str],
        latent_shape: tuple[int, int, int],
        *,
        observe: bool = True,
    ) -> Weights:
        """Weights of a batch.

        Args:
            video: [B, T, 3, H, W] in [0, 1], the decoded rollout; its own graph, if any, is not used.
            prompts: B of them.
            latent_shape: (F, h, w) of the latents the loss is on; T == 1 + 4 (F - 1).
            observe: add the scores to the balance history afterwards. P is always that of earlier updates, so
                micro-batches of one update should pass False and the caller `history.observe` all their
                scores once.

        Raises:
            TypeError, ValueError: a video of another type, shape or range, prompts or a latent shape that do
                not fit it, or a reward that scores something else.
        """
        scores, saliency = self.look(video, prompts, latent_shape)
        return self.weigh(scores, saliency, latent_shape, observe=observe)

    @property
    def uses_saliency(self) -> bool:
        """Whether the mode looks at pixels."""
        return self._parts.intra

    def weigh(
        self,
        scores: Tensor,
        saliency: Tensor | None,
        latent_shape: tuple[int, int, int],
        *,
        observe: bool = True,
    ) -> Weights:
        """Weights of a batch from what `look` said of it, in one call or in several."""
        frames, rows, columns = latent_shape
        inter, log = self._inter(scores)
        if saliency is not None:
            intra = intra_weights(saliency, scores, **self._intra_options)
            log |= self._shares(scores) | self._intra_log(intra)
        else:
            intra = scores.new_ones(len(scores), frames, 1, rows, columns)
        if observe:
            self.history.observe(scores)
        return Weights(inter, intra, scores, saliency, log)

    def state_dict(self) -> dict[str, Any]:
        """The balance history: part of a checkpoint. Plain numbers."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)

    def look(
        self, video: Tensor, prompts: Sequence[str], latent_shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [B, axes], and the saliency of every axis [axes, B, F, h, w] if the mode uses it.

        Arguments and errors are those of a call; `samples_at_once` are seen at a time.
        """
        check_video(video, prompts, name="StreamR1Weights")
        if len(latent_shape) != 3:
            raise ValueError(f"StreamR1Weights: latent_shape: expected (F, h, w), got {tuple(latent_shape)}")
        video, prompts = video.detach(), list(prompts)
        at_once = self.samples_at_once or max(len(prompts), 1)
        scores, saliency = [], []
        for start in range(0, max(len(prompts), 1), at_once):
            piece, words = video[start : start + at_once], prompts[start : start + at_once]
            if self._parts.intra:
                piece_scores, piece_saliency = self._differentiate(piece, words, latent_shape)
                saliency.append(piece_saliency)
            else:
                with torch.no_grad():
                    piece_scores = self._score(piece, words)
            scores.append(piece_scores.detach().float())
        found = torch.cat(scores)
        found = torch.where(found.isfinite(), found, torch.nan)
        return found, torch.cat(saliency, dim=1) if saliency else None

    def _differentiate(
        self, video: Tensor, prompts: list[str], latent_shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """One backward an axis, down to the pixels. An axis that ignores the video has no saliency."""
        saliency = []
        with torch.enable_grad():
            pixels = video.clone().requires_grad_()
            scores = self._score(pixels, prompts)
            if not scores.requires_grad:
                raise ValueError(
                    "StreamR1Weights: reward must be differentiable in the video, got scores without a graph"
                )
            for axis in range(len(self.axes)):
                last = axis == len(self.axes) - 1
                (grad,) = torch.autograd.grad(
                    scores[:, axis].sum(),
                    pixels,
                    retain_graph=not last,
                    allow_unused=True,
                    materialize_grads=True,
                )
                saliency.append(region_saliency(grad, latent_shape))
        return scores, torch.stack(saliency)

    def _score(self, video: Tensor, prompts: list[str]) -> Tensor:
        scores = self.reward.score(video, prompts)
        expected = (len(prompts), len(self.axes))
        if not isinstance(scores, Tensor) or scores.shape != expected:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"StreamR1Weights: reward must score {list(expected)}, got {got}")
        return scores

    def _inter(self, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
        """W_inter [B] and what to report of it and of the scores."""
        penalty = self.history.penalty() if self._parts.balance else 0.0
        if self._parts.inter == "none":
            log_weight = torch.zeros_like(scores[:, 0])
        elif self._parts.inter == "motion":
            log_weight = self.beta * scores[:, self.axes.index(self.motion_axis)]
        else:
            log_weight = self.beta * (scores.mean(dim=1) - self.balance * penalty)
        bound = math.inf if self.log_bound is None else self.log_bound
        inter = log_weight.clamp(-bound, bound).exp()
        log = {"balance/penalty": penalty}
        if len(scores):
            floored, capped = (log_weight < -bound).float().mean(), (log_weight > bound).float().mean()
            means = scores.mean(dim=0)
            spread = [inter.mean(), inter.min(), inter.max(), inter.std(correction=0)]
            none = scores.isnan().any(dim=1).float().mean()
            bounded = [floored + capped, floored, capped]
            numbers = torch.stack([*means, means.mean(), none, *spread, *bounded]).tolist()
            names = [f"reward/{axis}" for axis in self.axes] + ["reward/mean", NOT_FINITE]
            names += [
                f"inter/{what}" for what in ("mean", "min", "max", "std", "bounded", "floored", "capped")
            ]
            log |= dict(zip(names, numbers, strict=True))
        return inter, log

    def _intra_log(self, intra: Tensor) -> dict[str, float]:
        """How the weights spread, and which share of cells and of frames is at its floor.

        The least value of a map or profile is 0 before the floor, so what equals the least weight is at the
        floor wherever the floor is above what the strength leaves of it.
        """
        if not len(intra):
            return {}
        cells = intra[:, :, 0]  # [B, F, h, w]
        numbers = [cells.min(), cells.max(), cells.std(dim=(1, 2, 3), correction=0).mean()]
        for part, values, dims in (
            ("spatial", cells, (2, 3)),
            ("temporal", cells.mean(dim=(2, 3)), (1,)),
        ):
            options = self._intra_options
            acts = options[f"{part}_floor"] > 1 - options[f"{part}_strength"]
            low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
            level = low * (1 + _ROUNDING)
            at_floor = (values <= level) & (high > level)
            numbers.append(at_floor.float().mean() * float(acts and options[f"use_{part}"]))
        names = ("min", "max", "std", "spatial_floored", "temporal_floored")
        return dict(zip((f"intra/{name}" for name in names), torch.stack(numbers).tolist(), strict=True))

    def _shares(self, scores: Tensor) -> dict[str, float]:
        """How much of the saliency each axis provides, on average over the batch."""
        if not len(scores):
            return {}
        shares = torch.softmax(-scores / self._intra_options["temperature"], dim=1).mean(dim=0).tolist()
        return {f"share/{axis}": share for axis, share in zip(self.axes, shares, strict=True)}
