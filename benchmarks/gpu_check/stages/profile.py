"""The kernels of one chunk, by their time: what the prediction has to explain."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_check.context import CannotRunError, Context
from benchmarks.gpu_check.models import random_decoder, random_student
from benchmarks.gpu_check.sizes import sizes_of
from stream_r1.sampling.sampler import Sampler

KERNELS = 40


def run(context: Context) -> None:
    s, device = sizes_of(context.small), context.device
    student = random_student(s, device)
    for name in ("wan", "taehv"):
        try:
            decoder = random_decoder(name, s, device)
        except CannotRunError as error:
            context.record("profile", decoder=name, kernels=None, why=str(error))
            continue
        stream = Sampler(student, decoder, latent_size=s.latent).stream(
            torch.zeros(1, *s.text, device=device)
        )
        for _ in range(s.window // s.chunk + 1):
            next(stream)
        context.synchronize()
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
        with torch.profiler.profile(activities=activities) as profiler:
            next(stream)
            context.synchronize()
        on_gpu = device.type == "cuda"
        rows = [
            (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            for event in profiler.key_averages()
        ]
        rows = sorted((row for row in rows if row[2] > 0), key=lambda row: row[2], reverse=True)
        context.record(
            "profile",
            decoder=name,
            seconds=sum(row[2] for row in rows) / 1e6,
            kernels=[
                {"name": key[:200], "calls": calls, "seconds": us / 1e6} for key, calls, us in rows[:KERNELS]
            ],
        )
        del stream, decoder
