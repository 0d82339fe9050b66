"""Frames a second of a stream whose window is full, with random weights."""

from __future__ import annotations

import itertools

import torch

from benchmarks.gpu_check.context import CannotRunError, Context
from benchmarks.gpu_check.models import random_decoder, random_student
from benchmarks.gpu_check.sizes import sizes_of
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.sampler import Sampler

CHUNKS = 4
SMALL_CHUNKS = 1


def run(context: Context) -> None:
    s, device = sizes_of(context.small), context.device
    student = random_student(s, device)
    ran = False
    for name, tuned, graph in itertools.product(("taehv", "wan"), (False, True), (False, True)):
        facts = {"decoder": name, "cuda_graph": graph, "cudnn_benchmark": tuned}
        if tuned and graph:
            continue  # graphs hold the student alone, which has no convolutions to tune
        try:
            decoder = random_decoder(name, s, device)
            decoder.tune = tuned
            context.record("sampler", **facts, **_measured(context, student, decoder, graph))
            ran = True
        except Exception as error:  # of any kind: one setting must not hide the others
            context.record("sampler", **facts, fps=None, why=f"{type(error).__name__}: {error}"[:300])
        finally:
            decoder = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not ran:
        raise CannotRunError("no setting of the sampler ran")


def _measured(
    context: Context, student: CausalWanTransformer, decoder: VideoAutoencoder, graph: bool
) -> dict[str, object]:
    """The mean of some chunks, after the window is full and graphs are captured."""
    s, device = sizes_of(context.small), context.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sampler = Sampler(student, decoder, latent_size=s.latent, cuda_graph=graph)
    stream = sampler.stream(torch.zeros(1, *s.text, device=device))
    slots = (s.window - s.sink) // s.chunk
    for _ in range(s.window // s.chunk + slots):
        before = next(stream).timings.elapsed
    first_frame = stream.timings.first_frame
    count = SMALL_CHUNKS if context.small else CHUNKS
    made = list(itertools.islice(stream, count))  # decoded while the next one is made
    total = made[-1].timings.elapsed - before
    frames = sum(chunk.frames.shape[1] for chunk in made if chunk.frames is not None)
    return {
        "fps": frames / total,
        "student": sum(chunk.timings.denoise + chunk.timings.cache for chunk in made) / count,
        "decode": sum(chunk.timings.decode for chunk in made) / count,
        "first_frame": first_frame,
        "frames": frames // count,
        "memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }
