from collections.abc import Callable

import pytest
import torch
from distill_models import LATENT, tiny_student
from torch import Tensor

from stream_r1.distill import rollout as rollouts
from stream_r1.distill.noise import SampleNoise
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.sampler import Sampler
from stream_r1.schedule import FlowSchedule

SCHEDULE = FlowSchedule(5.0)
STEPS = SCHEDULE.denoising_steps([1000, 750, 500, 250])
SIGMAS = [1, 0.9375, 5 / 6, 0.625]

CACHES = {
    "everything": {},
    "window": {"window_frames": 6},
    "sink": {"window_frames": 9, "sink_frames": 3},
    "sizes in frames": {"window_frames": 8, "sink_frames": 1, "positions": "window"},
    "window positions, EMA sink": {
        "window_frames": 9,
        "sink_frames": 3,
        "positions": "window",
        "sink_ema": 0.9,
    },
}


def texts(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(3))


def noise(frames: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, *LATENT, generator=torch.Generator().manual_seed(4))


def renoiser() -> Callable[[Tensor], Tensor]:
    return SampleNoise([10, 11]).randn_like


def self_rollout(student, text: Tensor, start: Tensor, exit_step: int, *, grad=True, **changes) -> Tensor:
    batch, frames, _, *size = start.shape
    arguments = {"schedule": SCHEDULE, "steps": STEPS, "renoise": renoiser()} | changes
    rollout = rollouts.begin_rollout(
        student,
        student.encode_text(text),
        (batch, *size),
        max_frames=frames,
        exit_step=exit_step,
        **arguments,
    )
    return rollouts.self_rollout(rollout, start, grad=grad)


@pytest.mark.parametrize("first", [3, 1])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_rollout_is_the_masked_model_on_clean_chunks(exit_step: int, first: int) -> None:
    """No cache on the other side: passes see [clean chunks | noisy chunk] under the block-causal mask."""
    student, text, start = tiny_student(first_chunk_frames=first).eval(), texts(), noise(first + 6)
    got = self_rollout(student, text, start, exit_step)
    again, clean = renoiser(), start[:, :0]
    with torch.no_grad():
        for chunk in start.split([first, 3, 3], dim=1):
            x = chunk
            for k in range(exit_step + 1):
                t = torch.zeros(2, clean.shape[1] + x.shape[1])
                t[:, clean.shape[1] :] = 1000 * SIGMAS[k]
                v = student(torch.cat([clean, x], dim=1), t, text, mask="causal")[:, clean.shape[1] :]
                x0 = x - SIGMAS[k] * v
                if k < exit_step:
                    x = (1 - SIGMAS[k + 1]) * x0 + SIGMAS[k + 1] * again(x0)
            clean = torch.cat([clean, x0], dim=1)
    torch.testing.assert_close(got.detach(), clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_rollout_with_the_last_exit_is_sampling(cache: dict) -> None:
    student, text, noises = tiny_student(**cache).eval(), texts(), StreamNoise(7, 2)
    stream = Sampler(student, None, SCHEDULE, latent_size=LATENT[1:]).stream(text, seed=7, chunks=5)
    sampled = torch.cat([chunk.latents for chunk in stream], dim=1)
    shape = (3, *LATENT)
    start = torch.cat([noises.draw(chunk, 0, shape, torch.device("cpu")) for chunk in range(5)], dim=1)
    for grad in (True, False):
        fresh = iter([(chunk, step) for chunk in range(5) for step in (1, 2, 3)])

        def renoise(x: Tensor, fresh=fresh) -> Tensor:
            return noises.draw(*next(fresh), shape, x.device)

        got = self_rollout(student, text, start, 3, renoise=renoise, grad=grad)
        assert got.requires_grad is grad
        torch.testing.assert_close(got.detach(), sampled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_crosses_chunks(cache: dict, checkpointing: bool) -> None:
    student = tiny_student(**cache)
    if checkpointing:
        student.enable_gradient_checkpointing()
    start = noise(12).requires_grad_()
    x0 = self_rollout(student, texts(), start, 0)
    for chunk, part in enumerate(x0.split(3, dim=1)):
        (grad,) = torch.autograd.grad(part.square().sum(), start, retain_graph=True)
        norms = [own.norm().item() for own in grad.split(3, dim=1)]
        assert norms[chunk] > 0
        assert all(norm == 0 for other, norm in enumerate(norms) if other != chunk)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_checkpointing_gives_the_same_gradients(cache: dict) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = tiny_student(**cache)
        if checkpointing:
            student.enable_gradient_checkpointing()
        x0 = self_rollout(student, texts(), noise(12), 1)
        x0.square().mean().backward()
        gradients.append([p.grad for p in student.parameters()])
    assert all(g is not None and g.norm() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_a_past_that_is_not_evicted_is_not_copied() -> None:
    """A window of the whole clip holds for the backward what a student without a window does."""
    held, gradients = [], []
    for cache in ({}, {"window_frames": 12}, {"window_frames": 9}):
        student, storages = tiny_student(**cache), {}

        def keep(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            x0 = self_rollout(student, texts(), noise(12), 0)
        held.append(sum(storages.values()))
        gradients.append(torch.autograd.grad(x0.square().mean(), list(student.parameters())))
    assert held[1] == held[0] < held[2]
    assert all(map(torch.equal, gradients[0], gradients[1]))


def test_a_chunks_gradient_is_that_of_its_exit_step_on_frozen_context() -> None:
    """The weights' gradient stops at the past too: it is that of a single call on a cache made before."""
    student, text, start = tiny_student(), texts(), noise(6)
    x0 = self_rollout(student, text, start, 0)
    got = torch.autograd.grad(x0[:, 3:].sum(), list(student.parameters()))
    stream = student.new_cache(2, 4, 6, max_frames=6)
    stream.begin_chunk()
    student.forward_chunk(x0[:, :3].detach(), torch.zeros(2), student.encode_text(text).detach(), stream)
    stream.commit()
    stream.begin_chunk()
    x = start[:, 3:]
    v = student.forward_chunk(x, torch.full((2,), 1000.0), student.encode_text(text), stream, write=False)
    expected = torch.autograd.grad((x - v).sum(), list(student.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_context_noise_reaches_later_chunks_only() -> None:
    student, text, start = tiny_student().eval(), texts(), noise(6)
    clean, noisy = (self_rollout(student, text, start, 0, context_noise=t, grad=False) for t in (0.0, 400.0))
    assert torch.equal(clean[:, :3], noisy[:, :3])
    assert not torch.allclose(clean[:, 3:], noisy[:, 3:])


def test_noise_belongs_to_samples() -> None:
    whole, alone = SampleNoise([1, 2, 3]), SampleNoise([2])
    a, b = whole.randn(2, 3), alone.randn(2, 3)
    assert torch.equal(a[1:2], b)
    assert torch.equal(whole.dmd_timestep(SCHEDULE)[1:2], alone.dmd_timestep(SCHEDULE))
    assert not torch.equal(a[0], a[1])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="exit_step"):
        self_rollout(tiny_student(), texts(), noise(3), 4)
    with pytest.raises(ValueError, match="whole chunks"):
        self_rollout(tiny_student(), texts(), noise(4), 0)
