import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stream_r1.schedule import FlowSchedule


def test_published_constants() -> None:
    schedule = FlowSchedule(shift=5.0)
    steps = schedule.denoising_steps([1000, 750, 500, 250])
    assert steps == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert [schedule.sigma(t) for t in steps] == pytest.approx([1, 0.9375, 5 / 6, 0.625])


def test_steps_are_rows_of_the_shifted_table() -> None:
    # The published formulation: a table of 1000 shifted noise levels, looked up at 1000 - step.
    s = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    table = 1000 * 5 * s / (1 + 4 * s)
    steps = list(range(1000, 0, -37))
    looked_up = table[[1000 - step for step in steps]]
    ours = torch.tensor(FlowSchedule(5.0).denoising_steps(steps), dtype=torch.float64)
    torch.testing.assert_close(ours, looked_up)
    torch.testing.assert_close(torch.tensor(FlowSchedule(5.0).timesteps(1000), dtype=torch.float64), table)


@given(st.floats(0.5, 12), st.floats(0, 1000))
def test_warp_inverts_with_the_reciprocal_shift(shift: float, t: float) -> None:
    assert FlowSchedule(1 / shift).warp(FlowSchedule(shift).warp(t)) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_noise_and_velocity_give_x0_back(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    sigma = torch.rand(shape, generator=g)
    x_t = FlowSchedule.add_noise(x0, eps, sigma)
    for b in range(2):
        for f in range(3):
            s = sigma[(b, f)[: sigma.dim()]].double()
            torch.testing.assert_close(x_t[b, f], x0[b, f] + s * (eps[b, f] - x0[b, f]))
    back = FlowSchedule.x0_from_v(x_t, FlowSchedule.velocity(x0, eps), sigma)
    torch.testing.assert_close(back, x0)


def test_half_precision_sums_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 3, 4, 5, 6, generator=g).bfloat16()
    x_t = FlowSchedule.add_noise(x0, eps, 0.9375)
    torch.testing.assert_close(x_t, (0.0625 * x0.double() + 0.9375 * eps.double()).bfloat16(), rtol=0, atol=0)


def test_dmd_timesteps() -> None:
    t = FlowSchedule(5.0).dmd_timestep(20000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert t.min() == 20
    assert t.max() == 980
    # Half of u lies below 500, which the shift moves to 833.3.
    assert (t < 2500 / 3).float().mean().item() == pytest.approx(0.5, abs=0.02)
    again = FlowSchedule(5.0).dmd_timestep(20000, torch.Generator().manual_seed(0))
    assert torch.equal(t, again)


@pytest.mark.parametrize("steps", [[], [500, 750], [1001, 500], [500, 0], [500, 500]])
def test_impossible_steps_are_refused(steps: list[float]) -> None:
    with pytest.raises(ValueError, match="denoising_steps"):
        FlowSchedule().denoising_steps(steps)


def test_sigma_of_a_wrong_shape_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match="sigma"):
        FlowSchedule.add_noise(x, x, torch.zeros(3))
