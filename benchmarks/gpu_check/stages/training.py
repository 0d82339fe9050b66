"""A distillation step in bfloat16 with its backward, alone and as FSDP2 on one rank."""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.sizes import sizes_of
from stream_r1.distill.dmd import DistributionMatching
from stream_r1.distill.fsdp import shard_model
from stream_r1.distill.rollout import begin_rollout, self_rollout
from stream_r1.models.recompute import enable_checkpointing
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule

STEPS = 2  # the first one warms up


def run(context: Context) -> None:
    losses = {}
    for name in ("one process", "FSDP2, one rank"):
        if name != "one process":
            _begin_group(context)
        try:
            losses[name] = _train(context, name)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    alone, sharded = losses.values()
    difference = abs(alone - sharded) / abs(alone)
    context.record("sharded", name="FSDP2, one rank", right=difference < 0.02, difference=difference)


def _begin_group(context: Context) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo" if context.small else "nccl")


def _train(context: Context, name: str) -> float:
    """Seconds by part and memory of a step as recorded; returns its loss."""
    s, device = sizes_of(context.small), context.device
    torch.manual_seed(0)
    with torch.device(device):
        student, teacher, critic = (CausalWanTransformer(**s.student) for _ in range(3))
    if torch.distributed.is_initialized():
        mesh = init_device_mesh(device.type, (1,))
        for model in (student, teacher, critic):
            shard_model(model, mesh, bfloat16=True)
    teacher.requires_grad_(False)
    enable_checkpointing(student, keep_attention=True)
    enable_checkpointing(critic, keep_attention=True)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        for model in (student, critic)
    ]
    matching = DistributionMatching(
        teacher, critic, torch.zeros(1, *s.text, device=device), schedule=FlowSchedule(), guidance_scale=4.0
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        seconds, loss = _step(context, student, matching, optimizers)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    context.record("training", name=name, loss=loss, seconds=seconds, memory=memory)
    return loss


def _step(
    context: Context,
    student: CausalWanTransformer,
    matching: DistributionMatching,
    optimizers: list[torch.optim.AdamW],
) -> tuple[dict[str, float], float]:
    """One update of the student and one of the critic; all exit at the third step."""
    s, device, parts = sizes_of(context.small), context.device, {}
    generator = torch.Generator(device).manual_seed(1)
    noise, eps = (
        torch.randn(1, s.video, s.channels, *s.latent, device=device, generator=generator) for _ in range(2)
    )
    text, t = (
        torch.randn(1, *s.text, device=device, generator=generator),
        torch.tensor([600.0], device=device),
    )

    def since(begun: float) -> float:
        context.synchronize()
        return time.perf_counter() - begun

    begun = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        schedule = FlowSchedule()
        rollout = begin_rollout(
            student,
            student.encode_text(text),
            (1, *s.latent),
            max_frames=s.video,
            schedule=schedule,
            steps=schedule.denoising_steps((1000, 750, 500, 250)),
            exit_step=2,
            renoise=lambda x: torch.randn(x.shape, device=device, generator=generator),
        )
        x = self_rollout(rollout, noise)
        parts["rollout"] = since(begun)
        begun = time.perf_counter()
        loss = matching.loss(x.float(), text, t, eps)
        parts["teacher and critic"] = since(begun)
    begun = time.perf_counter()
    loss.backward()
    parts["backward"] = since(begun)
    begun = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        critic_loss = matching.critic_loss(x.detach().float(), text, t, eps)
    critic_loss.backward()
    parts["critic's step"] = since(begun)
    begun = time.perf_counter()
    for model, optimizer in zip((student, matching.critic), optimizers, strict=True):
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    parts["optimizers"] = since(begun)
    return parts, float(loss)
