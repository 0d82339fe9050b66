"""The phases that look at pixels: decoding a rollout, and the reward of it with its gradients."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stream_r1.distill.weighting import StreamR1Weights
from stream_r1.estimate.exchange import CountedSequence
from stream_r1.estimate.memoize import Memoized
from stream_r1.estimate.networks import make_reward, make_vae, remembered, reward_layers
from stream_r1.estimate.plan import Plan
from stream_r1.estimate.run import Phase, Run, grown
from stream_r1.estimate.work import SHALLOW
from stream_r1.models.sequence import SampleShare
from stream_r1.rewards.base import Reward


def _asked(plan: Plan) -> tuple[Any, ...]:
    named = plan.networks
    return plan.latents, plan.sequence, named.vae, named.reward, plan.settings.weighting, plan.capability


@remembered(by=_asked)
def pixel_phases(plan: Plan) -> list[Phase]:
    """Of the student's update, with the reward's layers estimated from shallow stacks."""
    return [_decode(plan), _reward(plan)]


def _seen(plan: Plan) -> int:
    """Samples that the first rank of a sequence decodes and scores; no other one has more."""
    return len(range(plan.samples)[SampleShare(plan.samples, CountedSequence(plan.sequence)).own])


def _reward(plan: Plan) -> Phase:
    config = plan.networks.reward
    assert config is not None
    layers = reward_layers(config)
    shallow = {name: min(SHALLOW[0], depth) for name, depth in layers.items()}
    base = _score_and_saliency(plan, shallow)
    look = base
    for name, depth in layers.items():
        if depth > shallow[name]:
            deeper = _score_and_saliency(plan, shallow | {name: shallow[name] + 1})
            look = grown(look, base, deeper, depth - shallow[name])
    return look


def _decode(plan: Plan) -> Phase:
    with ExitStack() as stack:
        run = Run(plan, stack)
        vae = make_vae(plan.networks.vae or {}, on_gpu=plan.on_gpu)
        run.begin(vae)
        x = torch.zeros(_seen(plan), *plan.latents[1:])
        with torch.no_grad():
            run.phase("student: decode", None, lambda: vae.decode(x), "autoencoder", shown=True)
    return run.phases[0]


class _AlikeSamples(StreamR1Weights):
    """Weights for which one of the samples, seen one after the other, is differentiated."""

    def __init__(self, reward: Reward, **settings: Any) -> None:
        super().__init__(reward, **settings)
        differentiate = super()._differentiate
        self._memoized = Memoized(lambda video, prompts, shape: differentiate(video, list(prompts), shape))

    def _differentiate(
        self, video: Tensor, prompts: list[str], latent_shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        scores, saliency = self._memoized(video, tuple(prompts), latent_shape)
        return scores, saliency


def _score_and_saliency(plan: Plan, layers: dict[str, int]) -> Phase:
    config = plan.networks.reward
    assert config is not None
    batch, (_, frames, _, height, width) = _seen(plan), plan.latents
    with ExitStack() as stack:
        if config["type"] == "small":  # of real weights
            reward = make_reward(config, layers, plan.on_gpu)
        run = Run(plan, stack)
        if config["type"] != "small":
            reward = make_reward(config, layers, plan.on_gpu)
        vae = make_vae(plan.networks.vae or {}, on_gpu=plan.on_gpu)
        run.begin(reward)
        pixels = 1 + vae.temporal_factor * (frames - 1)
        video = torch.zeros(batch, pixels, 3, height * vae.spatial_factor, width * vae.spatial_factor)
        weights = _AlikeSamples(reward, **plan.settings.weighting.model_dump())
        look = partial(weights.look, video, ["a prompt"] * batch, (frames, height, width))
        run.phase("student: reward", None, look, "reward", shown=True)
    return run.phases[0]
