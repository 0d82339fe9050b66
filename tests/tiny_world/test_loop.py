"""The training loop: resuming changes nothing, the average is one, and Muon's update is orthogonal."""

import signal

import pytest
import torch
from torch import nn

from stream_r1.config import SettingsError
from stream_r1.distill.optimizer_step import DivergedError
from stream_r1.tiny_world.loop import Loop, LoopSettings
from stream_r1.tiny_world.muon import Muon, orthogonalise


def make_loop(folder, steps, lr=1e-2, **origin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
    settings = LoopSettings(steps=steps, lr=lr, warmup=2, decay=0.0, ema=0.9, seed=3)
    return Loop(model, settings, folder / "state.pt", origin=origin)


def loss_of(loop):
    x = torch.randn(16, 24, generator=loop.generator)
    return (loop.model(x) - x).square().mean(), {}


def train(loop):
    return list(loop.run(lambda: loss_of(loop)))


def test_resumed_training_equals_unbroken_training_bit_for_bit(tmp_path):
    whole = make_loop(tmp_path / "whole", 8)
    assert train(whole) == list(range(1, 9))

    train(make_loop(tmp_path / "parts", 4))
    again = make_loop(tmp_path / "parts", 8)
    assert train(again) == [5, 6, 7, 8]

    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, average in whole.average.items():
        assert torch.equal(average, again.average[name])


def test_training_lowers_the_loss_and_the_average_is_not_the_last_weights(tmp_path):
    loop = make_loop(tmp_path, 200)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    before = (loop.model(x) - x).square().mean().item()
    train(loop)
    last = [p.detach().clone() for p in loop.model.parameters()]
    loop.swap()
    after = (loop.model(x) - x).square().mean().item()
    assert after < 0.5 * before
    assert not torch.equal(last[0], next(loop.model.parameters()))


def test_another_models_state_is_refused(tmp_path):
    train(make_loop(tmp_path, 1))
    with pytest.raises(SettingsError, match="another model's"):
        Loop(nn.Sequential(nn.Linear(24, 32)), LoopSettings(steps=2, lr=1e-2), tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lr": 2e-2}, "lr was 0.01, is 0.02"),
        ({"clips": "of another codec"}, "clips was 'of a codec', is 'of another codec'"),
        ({"batch": 8}, "batch was None, is 8"),
    ],
)
def test_the_state_of_another_training_is_refused_and_what_changed_is_named(tmp_path, changed, named):
    train(make_loop(tmp_path, 1, clips="of a codec"))
    with pytest.raises(SettingsError, match=named):
        make_loop(tmp_path, 2, **{"clips": "of a codec", **changed})


def test_a_state_that_has_done_more_steps_is_refused(tmp_path):
    train(make_loop(tmp_path, 2))
    with pytest.raises(SettingsError, match=r"training\.steps: expected at least 2"):
        make_loop(tmp_path, 1)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    loop = make_loop(tmp_path, 3)
    with pytest.raises(DivergedError, match="loss nan"):
        list(loop.run(lambda: (sum(p.sum() for p in loop.model.parameters()) * float("nan"), {})))


@pytest.fixture
def usual_interrupt():
    """As in a terminal: a suite that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_a_signal_saves_the_step_under_way_and_then_interrupts(tmp_path):
    whole, loop = make_loop(tmp_path / "whole", 6), make_loop(tmp_path / "parts", 6)
    train(whole)
    steps = loop.run(lambda: loss_of(loop))
    assert [next(steps), next(steps)] == [1, 2]
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    again = make_loop(tmp_path / "parts", 6)
    assert again.step == 2
    train(again)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_rises_stays_and_falls():
    settings = LoopSettings(steps=100, lr=1.0, warmup=10, decay=0.5)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(9) == settings.rate(50) == 1.0
    assert settings.rate(75) == pytest.approx(0.5)
    assert settings.rate(99) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    levelled = u.T @ orthogonalise(matrix) @ vh.T  # diagonal in the matrix's own singular vectors
    off_diagonal = levelled - torch.diag(levelled.diagonal())
    assert off_diagonal.abs().max() < 1e-6
    # the quintic's limit set, for singular values that are not tiny; the smallest of a square one may lag
    assert levelled.diagonal().max() < 1.25
    assert levelled.diagonal().median() > 0.65


def test_muon_treats_a_kernel_as_its_flattened_matrix():
    generator = torch.Generator().manual_seed(0)
    kernel = nn.Parameter(torch.randn(16, 8, 3, 3, generator=generator))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(kernel.shape, generator=generator)
    matrix.grad = kernel.grad.flatten(1).clone()
    Muon([kernel], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_bfloat16_is_for_matmuls_only(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(24, 32)
    seen = []
    settings = LoopSettings(steps=2, lr=1e-2, warmup=0, bfloat16=True)
    loop = Loop(model, settings, tmp_path / "state.pt", lambda name, p: p.ndim == 2)

    def loss():
        y = model(torch.randn(16, 24, generator=loop.generator))
        seen.append(y.dtype)
        return y.float().square().mean(), {}

    before = model.weight.detach().clone()
    assert list(loop.run(loss)) == [1, 2]
    assert seen == [torch.bfloat16] * 2
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)
    assert not torch.equal(model.weight, model.weight.bfloat16().float())  # nothing is rounded
