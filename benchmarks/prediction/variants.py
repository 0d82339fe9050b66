"""A chunk done otherwise: in fewer steps, by several GPUs, decoded by the tiny autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.prediction.streaming import FRAMES, HALF, LATENT, STEPS, student, wan_decoder
from stream_r1.estimate.devices import Device
from stream_r1.estimate.streaming import ChunkWork, as_on, decoder_work
from stream_r1.estimate.work import Work, cast, fake_tensors
from stream_r1.models.taehv import TinyVAE

FEWER = (1000, 500)  # timesteps of two steps
GPUS = (1, 4)


@dataclass(frozen=True)
class Variant:
    """A way to make a chunk: the student's work on each GPU, and that of either decoder on the first."""

    steps: int
    linear: str  # layers: "bfloat16" or "FP8"
    gpus: int
    wan: ChunkWork
    tiny: ChunkWork

    @property
    def name(self) -> str:
        return f"{self.steps} steps, {self.linear}, {'one GPU' if self.gpus == 1 else f'{self.gpus} GPUs'}"


def variants(device: Device) -> list[Variant]:
    """All of them, in bfloat16 but for the linear layers where it says so."""
    tiny = tiny_decoder(device)
    found = []
    for steps in (STEPS, FEWER):
        for linear, quantize in (("bfloat16", None), ("FP8", "fp8")):
            for gpus in GPUS:
                work = student(device, steps, gpus, quantize)
                chunks = (ChunkWork(work, decoder, FRAMES) for decoder in (wan_decoder(), tiny))
                found.append(Variant(len(steps), linear, gpus, *chunks))
    return found


def tiny_decoder(device: Device) -> list[Work]:
    """TAEHV on a chunk, in bfloat16."""
    with fake_tensors(), as_on(device), torch.no_grad():
        return decoder_work(cast(TinyVAE(), HALF), torch.zeros(1, 3, 16, *LATENT))
