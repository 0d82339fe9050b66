import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stream_r1_kernels import dmd_gradient_, dmd_loss

BACKENDS = ["cpu", "reference"]
SHAPE = (2, 3, 4, 5, 6)


def published(x, fake, cond, uncond=None, *, guidance=3.0, w_intra=None, w_inter=None, mask=None) -> Tensor:
    """Sample by sample as DMD2's code writes it, with cut-away instead of masked elements, in float64."""
    samples = []
    for b in range(x.shape[0]):
        with torch.no_grad():
            real = cond[b].double()
            if uncond is not None:
                real = real + guidance * (real - uncond[b].double())
            distance = (x[b].double() - real).abs().mean()
            gradient = torch.nan_to_num((fake[b].double() - real) / distance, posinf=0, neginf=0)
        target = (x[b].double() - gradient).detach()
        errors = F.mse_loss(x[b].double(), target, reduction="none")
        if w_intra is not None:
            errors = errors * w_intra.expand_as(x)[b]
        if mask is not None:
            errors = errors[mask.expand_as(x)[b]]
        loss = 0.5 * errors.mean() if errors.numel() else errors.sum()
        samples.append(loss if w_inter is None else loss * w_inter[b])
    return torch.stack(samples).mean()


def predictions(shape=SHAPE, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for _ in range(4)]


def weights(shape=SHAPE) -> dict[str, Tensor]:
    batch, frames, _, rows, columns = shape
    return {
        "w_intra": torch.rand(batch, frames, 1, rows, columns) + 0.1,
        "w_inter": torch.rand(batch) * 4,
        "mask": torch.rand(batch, frames, 1, 1, 1) < 0.6,
    }


def value_and_gradient(function, x: Tensor, *others, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, *others, **options)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


def check(x, *others, backend, **options) -> None:
    truth, true_gradient = value_and_gradient(published, x.double(), *others, **options)
    loss, gradient = value_and_gradient(dmd_loss, x, *others, backend=backend, **options)
    assert loss.dtype == torch.float32
    assert gradient.dtype == x.dtype
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-12)
    # Twice the rounding of x's dtype: the direction is rounded, then its product with the sample's factor.
    unit = max(2 * torch.finfo(x.dtype).eps, 4e-6)
    tiny = 2.0**-24 if x.dtype == torch.float16 else 1e-6 * true_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=unit, atol=tiny)
    buffer = torch.ones_like(x, dtype=torch.float32)
    out = dmd_gradient_(buffer, x, *others, backend=backend, scale=0.5, **options)
    assert out is buffer
    torch.testing.assert_close(buffer.double(), 1 + 0.5 * true_gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [(), ("w_intra",), ("w_inter",), ("mask",), ("w_intra", "w_inter", "mask")])
def test_against_the_published_formulation(used, dtype, backend):
    inputs = predictions(dtype=dtype)
    options = {name: value for name, value in weights().items() if name in used}
    check(*inputs, backend=backend, **options)
    check(*inputs[:3], backend=backend, **options)
    check(*inputs, backend=backend, guidance=0.0, **options)


def test_many_elements_are_summed_without_losing_digits():
    check(*predictions((1, 7, 16, 60, 104)), backend="cpu", w_intra=torch.rand(1, 7, 1, 60, 104) + 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_true_is_no_mask_and_frames_can_be_cut_away(backend):
    x, fake, cond, uncond = predictions()
    w = weights()
    everything = torch.ones(2, 1, 1, 1, 1, dtype=torch.bool)
    for mask in (everything, everything.expand(SHAPE)):
        masked = value_and_gradient(dmd_loss, x, fake, cond, uncond, **w | {"mask": mask}, backend=backend)
        plain = value_and_gradient(dmd_loss, x, fake, cond, uncond, **w | {"mask": None}, backend=backend)
        torch.testing.assert_close(masked, plain)
    nothing = ~everything
    loss, gradient = value_and_gradient(dmd_loss, x, fake, cond, mask=nothing, backend=backend)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_s_nan_weight_is_hidden_nowhere(backend):
    """Where the mask drops elements either: in all of the sample, and in no other one."""
    inputs, w = predictions(), weights()
    corrupted = w | {"w_inter": w["w_inter"].index_fill(0, torch.tensor([1]), torch.nan)}
    loss, gradient = value_and_gradient(dmd_loss, *inputs, **corrupted, backend=backend)
    buffer = dmd_gradient_(torch.zeros(SHAPE), *inputs, **corrupted, backend=backend)
    _, expected = value_and_gradient(dmd_loss, *inputs, **w, backend=backend)
    assert loss.isnan()
    for got in (gradient, buffer):
        assert got[1].isnan().all()
        torch.testing.assert_close(got[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_counts_as_zero(bad, backend):
    x, fake, cond, uncond = predictions()
    fake[0, 1, 2, 3, 4] = bad
    loss, gradient = value_and_gradient(dmd_loss, x, fake, cond, uncond, backend=backend)
    truth, true_gradient = value_and_gradient(published, x.double(), fake, cond, uncond)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert gradient[0, 1, 2, 3, 4] == 0
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-9)
    cond[1, 0, 0, 0, 0] = bad  # the normaliser of the sample is lost: all of the sample is
    loss, gradient = value_and_gradient(dmd_loss, x, fake, cond, uncond, backend=backend)
    assert loss.isfinite()
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()
    # x == real: 0 / 0 and c / 0
    loss, gradient = value_and_gradient(dmd_loss, x, torch.randn(SHAPE), x, backend=backend)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_without_a_finite_mean_has_no_gradient_though_differences_overflow(backend):
    x, fake, cond, _ = predictions(dtype=torch.float16)
    fake[0, 0, 0, 0, 0], cond[0, 0, 0, 0, 0] = 60000, -60000  # their difference is no float16
    x[0, 1, 1, 1, 1] = torch.inf
    loss, gradient = value_and_gradient(dmd_loss, x, fake, cond, backend=backend)
    truth, true_gradient = value_and_gradient(published, x[1:].double(), fake[1:], cond[1:])
    torch.testing.assert_close(loss.double(), truth / 2, rtol=1e-6, atol=0)
    assert (gradient[0] == 0).all()
    torch.testing.assert_close(gradient[1:].double(), true_gradient / 2, rtol=2e-3, atol=2.0**-24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_differences_and_weights_stay_in_range_of_float16(backend):
    x, fake, cond, _ = (value.half() * 8000 for value in predictions())
    w_intra = torch.full((1, 1, 1, 1, 1), 100.0)
    _, gradient = value_and_gradient(
        lambda *a: dmd_loss(*a, w_intra=w_intra, backend=backend) * 64, x, fake, cond
    )
    _, exact = value_and_gradient(lambda *a: published(*a, w_intra=w_intra) * 64, x.double(), fake, cond)
    torch.testing.assert_close(gradient.double(), exact, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_weights_are_plain_dmd_and_samples_do_not_mix(backend):
    x, fake, cond, uncond = predictions((4, 2, 3, 4, 5))
    plain = value_and_gradient(dmd_loss, x, fake, cond, uncond, backend=backend)
    uniform = {"w_intra": torch.ones(4, 2, 1, 4, 5), "w_inter": torch.ones(4)}
    torch.testing.assert_close(
        value_and_gradient(dmd_loss, x, fake, cond, uncond, **uniform, backend=backend), plain
    )
    order = torch.tensor([3, 1, 0, 2])
    permuted = value_and_gradient(dmd_loss, *(t[order] for t in (x, fake, cond, uncond)), backend=backend)
    torch.testing.assert_close(permuted, (plain[0], plain[1][order]))
    alone = value_and_gradient(dmd_loss, *(t[2:3] for t in (x, fake, cond, uncond)), backend=backend)
    torch.testing.assert_close(alone[1] / 4, plain[1][2:3])


def test_the_backward_scales_the_gradient():
    x, fake, cond, uncond = predictions()
    once = value_and_gradient(dmd_loss, x, fake, cond, uncond, backend="cpu")[1]
    thrice = value_and_gradient(lambda *a: 3 * dmd_loss(*a, backend="cpu"), x, fake, cond, uncond)[1]
    torch.testing.assert_close(thrice, 3 * once)


def test_loss_scaling_rescues_float16_gradients():
    """1 / numel underflows in float16: the factor must not be rounded before the loss scale joins it."""
    x, fake, cond, uncond = predictions((1, 7, 16, 30, 52), torch.float16)
    truth = value_and_gradient(published, x.double(), fake, cond, uncond)[1] * 2.0**16
    got = value_and_gradient(lambda *a: dmd_loss(*a, backend="cpu") * 2.0**16, x, fake, cond, uncond)[1]
    torch.testing.assert_close(got.double(), truth, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_accumulates_over_micro_steps_into_strided_and_low_precision_buffers(backend):
    x, fake, cond, uncond = predictions()
    w = weights()
    gradient = value_and_gradient(dmd_loss, x, fake, cond, uncond, **w, backend=backend)[1]
    x.requires_grad_()
    strided = torch.zeros(2, 3, 4, 6, 5).transpose(3, 4)
    version = strided._version
    for _ in range(4):
        dmd_gradient_(strided, x, fake, cond, uncond, **w, scale=0.25, backend=backend)
    torch.testing.assert_close(strided, gradient)
    assert strided._version > version
    low = [value.detach().bfloat16() for value in (x, fake, cond, uncond)]
    buffer = torch.zeros(SHAPE, dtype=torch.bfloat16)
    dmd_gradient_(buffer, *low, **w, backend=backend)
    torch.testing.assert_close(buffer, value_and_gradient(dmd_loss, *low, **w)[1], rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x = torch.zeros(0, 3, 4, 5, 6)
    loss, gradient = value_and_gradient(dmd_loss, x, x, x, w_inter=torch.zeros(0), backend=backend)
    assert loss == 0
    assert gradient.shape == x.shape
    dmd_gradient_(x.clone(), x, x, x, backend=backend)


@pytest.mark.usefixtures("restored_threads")
def test_the_number_of_threads_does_not_change_a_bit():
    inputs = predictions((1, 5, 7, 31, 53))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(value_and_gradient(dmd_loss, *inputs, backend="cpu"))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_opcheck_and_compile():
    x, fake, cond, uncond = predictions()
    w = weights()
    x.requires_grad_()
    arguments = (fake, cond, uncond, 3.0, w["w_intra"], w["w_inter"], w["mask"])
    torch.library.opcheck(torch.ops.stream_r1.dmd_loss, (x, *arguments))
    torch.library.opcheck(torch.ops.stream_r1.dmd_loss, (x, fake, cond, None, 3.0, None, None, None))
    torch.library.opcheck(torch.ops.stream_r1.dmd_loss_backward, (torch.tensor(2.0), fake, w["w_inter"]))
    torch.library.opcheck(
        torch.ops.stream_r1.dmd_gradient_, (torch.zeros(SHAPE), x.detach(), *arguments, 0.5)
    )

    def step(x, fake, cond, uncond):
        return dmd_loss(x, fake, cond, uncond, **w, backend="cpu") * 2

    def accumulate(buffer, start, x, fake, cond, uncond):
        """Into some frames of a clip's gradient, as a loop over chunks does."""
        part = buffer[:, start : start + x.shape[1]]
        return dmd_gradient_(part, x, fake, cond, uncond, **w, scale=0.5, backend="cpu") * 1

    inputs = [x.detach(), fake, cond, uncond]
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, *inputs), value_and_gradient(step, *inputs))
    compiled = torch.compile(accumulate, fullgraph=True)
    clip = (SHAPE[0], 4 * SHAPE[1], *SHAPE[2:])
    first, second = torch.ones(clip), torch.ones(clip)
    for start in range(0, 4 * SHAPE[1], SHAPE[1]):
        torch.testing.assert_close(compiled(first, start, *inputs), accumulate(second, start, *inputs))
        torch.testing.assert_close(first, second)


def test_second_derivatives_are_refused():
    x, fake, cond, uncond = predictions()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(
        dmd_loss(x, fake, cond, uncond, backend="cpu") ** 2, x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()


P = torch.ones(2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dmd_loss(P[0], P, P), ValueError, r"dmd_loss: x: expected shape \[B, F, C, h, w\]"),
        (lambda: dmd_loss(P.int(), P, P), TypeError, "dmd_loss: x: expected float32"),
        (
            lambda: dmd_loss(P, P[:1], P),
            ValueError,
            r"fake: expected shape \[2, 3, 4, 5, 6\] as x, got \[1, 3",
        ),
        (
            lambda: dmd_loss(P, P, P.half()),
            TypeError,
            "real_cond: expected torch.float32 as x, got torch.float16",
        ),
        (lambda: dmd_loss(P, P, P, P.clone().requires_grad_()), ValueError, r"pass real_uncond\.detach\(\)"),
        (
            lambda: dmd_loss(P, P, P, w_intra=P[:, :2]),
            ValueError,
            r"w_intra: expected 5 dimensions that broadcast",
        ),
        (lambda: dmd_loss(P, P, P, w_intra=P.half()), TypeError, "w_intra: expected float32 or float64"),
        (
            lambda: dmd_loss(P, P, P, w_inter=torch.ones(3)),
            ValueError,
            r"w_inter: expected shape \[2\], got \[3\]",
        ),
        (lambda: dmd_loss(P, P, P, mask=P), TypeError, "mask: expected bool, got torch.float32"),
        (
            lambda: dmd_loss(P, P, P, mask=torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            "mask: expected 5 dim",
        ),
        (lambda: dmd_gradient_(P[:1], P, P, P), ValueError, "dmd_gradient_: buffer: expected shape"),
        (lambda: dmd_gradient_(P.half(), P, P, P), TypeError, "buffer: expected torch.float32"),
        (
            lambda: dmd_gradient_(P.clone().requires_grad_(), P, P, P),
            ValueError,
            "buffer: .* not require grad",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
