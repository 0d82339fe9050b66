"""The phases of a training step, run on fake tensors: the memory that each needs, and its work.

What runs is the project's own code, of networks with one and two layers; a phase's bytes and calls grow by
the same amount with every layer, so those of the real depth follow.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from stream_r1.chunk_loop import ChunkLoop
from stream_r1.distill.dmd import DistributionMatching
from stream_r1.distill.long_rollout import long_rollout
from stream_r1.distill.rollout import begin_rollout, self_rollout
from stream_r1.distill.settings import InitSettings, RolloutSettings
from stream_r1.distill.weighting import Weights
from stream_r1.estimate.exchange import CountedSequence
from stream_r1.estimate.networks import Network, make_vae, remembered
from stream_r1.estimate.pixels import pixel_phases
from stream_r1.estimate.plan import Plan, roles
from stream_r1.estimate.run import Phase, Run, grown
from stream_r1.estimate.work import SHALLOW
from stream_r1.models.recompute import enable_checkpointing
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.recipe import InitRecipe, Recipe
from stream_r1.schedule import FlowSchedule

_APART = {  # settings that change no phase, or by what else a plan says
    *("batch", "accumulation", "distributed", "steps", "prompts", "text", "out", "watch", "models", "reward"),
}


def _asked(plan: Plan) -> tuple[Any, ...]:
    n = plan.networks
    networks = n.student, n.teacher, n.critic, n.vae, n.reward
    settings = plan.recipe.model_dump(exclude=_APART)
    ranks = plan.sequence, plan.narrow, plan.keeps_gradients
    return settings, plan.capability, *networks, plan.samples, *ranks


@remembered(by=_asked)
def training_phases(plan: Plan) -> list[Phase]:
    """Of one micro-batch, in their order: the student's update, then the critic's; or of a start's step."""
    steps = _distillation if isinstance(plan.recipe, Recipe) else _start
    whole = {role: network.layers for role, network in roles(plan).items()}
    if max(whole.values()) <= SHALLOW[1]:
        phases = steps(plan, 0)
    else:
        shallow, deeper = (steps(plan, depth) for depth in SHALLOW)
        phases = [
            grown(a, a, b, whole[a.role] - SHALLOW[0]) if a.role else a
            for a, b in zip(shallow, deeper, strict=True)
        ]
    if isinstance(plan.recipe, Recipe):
        at = next(i for i, phase in enumerate(phases) if phase.role == "teacher")
        phases[at:at] = pixel_phases(plan)
    return phases


def _network(
    run: Run, network: Network, depth: int, memory: RolloutSettings | InitSettings | None = None
) -> nn.Module:
    """memory: says whether activations are kept; None: nothing is learnt."""
    plan = run.plan
    with unset_fake_temporarily():  # peft moves what it makes, which fake tensors do not let it
        model = network.make(depth or network.layers)
    for part in model.modules():
        for name, p in part._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=torch.bfloat16 if plan.narrow else p.dtype)
                part._parameters[name] = nn.Parameter(fake, p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    if plan.sequence > 1:
        model.enable_sequence_parallel(CountedSequence(plan.sequence))  # type: ignore[operator]
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(partial(_count_gradient, run))
    if memory is not None and memory.gradient_checkpointing:
        enable_checkpointing(model, keep_attention=memory.keep_attention)
    return model.train()


def _count_gradient(run: Run, p: Tensor) -> None:
    assert p.grad is not None
    if run.plan.keeps_gradients:
        run.live.move(p.grad, "gradients")
    else:
        p.grad = None


def _distillation(plan: Plan, depth: int) -> list[Phase]:
    """All phases but those that look at pixels."""
    settings, networks = plan.settings, plan.networks
    with ExitStack() as stack:
        run = Run(plan, stack)
        student = _network(run, networks.student, depth, settings.rollout)
        assert isinstance(student, CausalWanTransformer)
        assert networks.teacher is not None
        assert networks.critic is not None
        teacher = _network(run, networks.teacher, depth).eval().requires_grad_(False)
        critic = _network(run, networks.critic, depth, settings.rollout)
        long = settings.rollout.bounds[1] > settings.rollout.frames
        codec = [make_vae(networks.vae or {}, on_gpu=plan.on_gpu)] if long else []
        run.begin(student, teacher, critic, *codec)
        passes = _count_passes(plan)

        schedule = FlowSchedule(settings.rollout.shift)
        text = _text(plan)
        x = run.phase(
            "student: rollout",
            "student",
            lambda: _rollout(run, student, text, schedule, codec),
            passes=passes,
        )
        matching = DistributionMatching(
            teacher,
            critic,
            torch.zeros_like(text[:1]),
            schedule=schedule,
            guidance_scale=settings.matching.guidance_scale,
        )
        t = torch.full((plan.samples,), 500.0)

        def real() -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
            with torch.no_grad(), run.precision():
                x_t = schedule.add_noise(x.detach(), torch.zeros_like(x), schedule.sigma(t))
                return x_t, matching.real_x0(x_t, t, text)

        scores = [run.phase("student: teacher's scores", "teacher", real, passes=1)]

        def loss() -> Tensor:
            x_t, (cond, uncond) = scores[0]
            with run.precision():
                with torch.no_grad():
                    fake = matching.fake_x0(x_t, t, text)
                one = torch.ones_like(x[:, 0, 0, 0, 0])
                weights = Weights(one, torch.ones_like(x[:, :, :1]), one[:, None], None, {})
                return matching.loss_between(x, cond, uncond, fake, weights)

        value = run.phase("student: critic's scores", "critic", loss, passes=1)
        scores.clear()
        run.phase("student: backward", "student", value.backward, backward=True, passes=plan.chunks)
        del x, value
        student.zero_grad()

        x = run.phase(
            "critic: rollout",
            "student",
            partial(_rollout, run, student, text, schedule, codec, grad=False)
            if codec
            else partial(_last_chunk, run, student, text, schedule),
            passes=passes,
            learns="critic",
        )
        rollout = run.phases[0]
        run.phases[-1] = replace(run.phases[-1], work=rollout.work)  # of all chunks

        def critic_loss() -> Tensor:
            with run.precision():
                return matching.critic_loss(x, text, t, torch.zeros_like(x))

        value = run.phase("critic: forward", "critic", critic_loss, passes=1, learns="critic")
        run.phase("critic: backward", "critic", value.backward, backward=True, passes=1, learns="critic")
    return run.phases


def _count_passes(plan: Plan) -> int:
    """Of a rollout whose chunks leave at the first step: one of a chunk, and one that leaves it behind."""
    low, high = plan.recipe.rollout.bounds
    chunk = plan.networks.student.config.get("frames_per_chunk", 3)
    return 2 * (plan.chunks + ((low + high) // 2 - plan.recipe.rollout.frames) // chunk)


def _text(plan: Plan) -> Tensor:
    config = plan.networks.student.config
    return torch.zeros(plan.samples, config.get("text_len", 512), config.get("text_dim", 4096))


def _rollout_loop(run: Run, student: CausalWanTransformer, text: Tensor, schedule: FlowSchedule) -> ChunkLoop:
    size, (batch, _, _, height, width) = run.plan.recipe.rollout, run.plan.latents
    rollout = begin_rollout(
        student,
        student.encode_text(text),
        (batch, height, width),
        max_frames=size.bounds[1],
        schedule=schedule,
        steps=schedule.denoising_steps(size.steps),
        exit_step=0,
        context_noise=size.context_noise,
    )
    run.live.move(rollout.cache.storage, "cache")
    return rollout


def _rollout(
    run: Run,
    student: CausalWanTransformer,
    text: Tensor,
    schedule: FlowSchedule,
    codec: list[Any],
    *,
    grad: bool = True,
) -> Tensor:
    batch, frames, channels, height, width = run.plan.latents

    def noise(frames: int) -> Tensor:
        return torch.zeros(batch, frames, channels, height, width)

    with run.precision(), torch.set_grad_enabled(grad):
        rollout = _rollout_loop(run, student, text, schedule)
        length = run.plan.recipe.rollout.bounds[1]
        if length == frames:
            return self_rollout(rollout, noise(frames), grad=grad)
        shared = student.sequence
        clip = long_rollout(
            rollout, noise, length=length, frames=frames, codec=codec[0], grad=grad, sequence=shared
        )
        return clip.x


@torch.no_grad()
def _last_chunk(run: Run, student: CausalWanTransformer, text: Tensor, schedule: FlowSchedule) -> Tensor:
    """Without a graph no chunk needs more memory than the last one."""
    x = torch.zeros(run.plan.latents)
    with run.precision():
        rollout = _rollout_loop(run, student, text, schedule)
        for _ in range(run.plan.chunks - 1):
            rollout.cache.begin_chunk()
            rollout.cache.commit()
        last = x[:, -rollout.cache.frames_per_chunk :]
        last.copy_(rollout.denoise(torch.zeros_like(last), grad=False))
    return x


def _start(plan: Plan, depth: int) -> list[Phase]:
    """ODE regression or teacher forcing: all chunks of a clip at once, under the causal mask."""
    recipe = plan.recipe
    assert isinstance(recipe, InitRecipe)
    with ExitStack() as stack:
        run = Run(plan, stack)
        student = _network(run, plan.networks.student, depth, recipe)
        run.begin(student)
        text = _text(plan)

        def forward() -> Tensor:
            x = torch.zeros(plan.latents)
            t = torch.full(x.shape[:2], 500.0)
            clean = x if recipe.kind == "teacher-forcing" else None
            with run.precision():
                return (student(x, t, text, mask="causal", clean_x=clean) - x).square().mean()

        loss = run.phase("student: forward", "student", forward, passes=1)
        run.phase("student: backward", "student", loss.backward, backward=True, passes=1)
    return run.phases
