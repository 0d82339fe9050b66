import pytest
import torch
from distill_models import LATENT, SIZES, tiny_teacher

from stream_r1.distill.dmd import DistributionMatching, velocity
from stream_r1.distill.weighting import Weights
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule

SCHEDULE = FlowSchedule(5.0)


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 2, 6, *LATENT, generator=g)
    text, negative = torch.randn(2, 8, 16, generator=g), torch.randn(1, 8, 16, generator=g)
    return x, eps, text, negative, torch.tensor([300.0, 900.0])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_the_difference_of_the_scores(weighted: bool) -> None:
    """Written out a sample at a time with diffusers' models, in their own layout."""
    x, eps, text, negative, t = inputs()
    teacher, critic = tiny_teacher(1).eval(), tiny_teacher(2).eval()
    matching = DistributionMatching(teacher, critic, negative, schedule=SCHEDULE, guidance_scale=4.0)
    weights = None
    if weighted:
        g = torch.Generator().manual_seed(1)
        intra = torch.rand(2, 6, 1, *LATENT[1:], generator=g)
        weights = Weights(torch.tensor([0.5, 2.0]), intra, torch.zeros(2, 3), None, {})
    x.requires_grad_()
    loss = matching.loss(x, text, t, eps, weights)
    (got,) = torch.autograd.grad(loss, x)

    expected, total = torch.zeros_like(x), 0.0
    with torch.no_grad():
        for b in range(2):
            sigma = t[b] / 1000
            x_t = (1 - sigma) * x[b] + sigma * eps[b]

            def x0(model: torch.nn.Module, words: torch.Tensor, x_t=x_t, sigma=sigma, b=b) -> torch.Tensor:
                v = model(x_t.transpose(0, 1)[None], t[b : b + 1], words, return_dict=False)[0]
                return x_t - sigma * v[0].transpose(0, 1)

            cond, uncond = x0(teacher, text[b : b + 1]), x0(teacher, negative)
            real = cond + 3.0 * (cond - uncond)
            g_b = (x0(critic, text[b : b + 1]) - real) / (x[b] - real).abs().mean()
            weight = weights.inter[b] * weights.intra[b] if weights else torch.ones(())
            expected[b] = weight * g_b / x.numel()
            total += (weight * g_b.square()).mean().item() / 2 / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert all(p.grad is None for model in (teacher, critic) for p in model.parameters())


def test_without_guidance_the_negative_is_not_asked() -> None:
    x, _, text, negative, t = inputs()
    matching = DistributionMatching(
        tiny_teacher(), tiny_teacher(), negative, schedule=SCHEDULE, guidance_scale=1.0
    )
    with torch.no_grad():
        cond, uncond = matching.real_x0(x, t, text)
    assert uncond is None
    torch.testing.assert_close(cond, SCHEDULE.x0_from_v(x, velocity(matching.teacher, x, t, text), t / 1000))


def test_critic_learns_the_students_velocity() -> None:
    x, eps, text, negative, t = inputs()
    critic = tiny_teacher(2)
    matching = DistributionMatching(tiny_teacher(1), critic, negative, schedule=SCHEDULE)
    loss = matching.critic_loss(x, text, t, eps)
    sigma = (t / 1000).view(2, 1, 1, 1, 1)
    v = critic(((1 - sigma) * x + sigma * eps).transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(v, eps - x))
    loss.backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in matching.teacher.parameters())


def test_both_kinds_of_score_models_agree() -> None:
    x, _, text, _, t = inputs()
    theirs = tiny_teacher().eval()
    ours = CausalWanTransformer(**SIZES, text_len=8).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            velocity(ours, x, t, text), velocity(theirs, x, t, text), rtol=1e-4, atol=1e-5
        )
