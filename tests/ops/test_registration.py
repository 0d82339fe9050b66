"""The two copies of every op: what autograd and tracing see, and what the public functions call otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stream_r1_kernels import ChunkMask, RotaryGrid, chunk_attention, dmd_gradient_, gated_add, qk_norm_rotary
from stream_r1_kernels.schemas import GPU_SCHEMAS, SCHEMAS

OPS, UNRECORDED = torch.ops.stream_r1, torch.ops.stream_r1_unrecorded
torch.manual_seed(0)
X, GATE, WEIGHT = torch.randn(2, 6, 8), torch.randn(2, 3, 8), torch.randn(8)
HEADS, LATENTS = torch.randn(2, 6, 2, 8), torch.randn(4, 2, 3, 4, 5, 6)
PHASES = RotaryGrid(4).phases(0, 1, 2, 3)
MASK = (ChunkMask(1, 3).table(6), 0.3)

# Ops with a backward: arguments, and the places of those that it is for.
TRAINED: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "gated_add": ((X, X.flip(1), GATE), (0, 1, 2)),
    "modulated_norm": ((X, GATE, GATE.flip(1), 1e-6), (0, 1, 2)),
    "rms_norm_silu": ((X, WEIGHT, X[:, :2], 1e-6), (0, 1, 2)),
    "qk_norm_rotary": ((X, X.flip(1), WEIGHT, WEIGHT.flip(0), *PHASES, 2, 1e-6), (0, 1, 2, 3)),
    "cached_chunk_attention": ((HEADS, HEADS + 1, HEADS - 1, HEADS.flip(1), HEADS, 0.3), (0, 1, 2)),
    "chunk_attention": ((HEADS, HEADS + 1, HEADS - 1, *MASK), (0, 1, 2)),
    "dmd_loss": ((*LATENTS, 3.0, None, None, None), (0,)),
}


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "dmd_loss"])  # its g is held constant
def test_the_copies_agree_and_the_recorded_one_has_the_gradient(name: str) -> None:
    arguments, places = TRAINED[name]
    plain = first(getattr(UNRECORDED, name)(*arguments))
    given = [x.clone().requires_grad_() if i in places else x for i, x in enumerate(arguments)]
    out = first(getattr(OPS, name)(*given))
    assert torch.equal(out, plain)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, [given[i] for i in places], upstream)
    # along a line: the change of the op itself, in float32
    for place, grad in zip(places, grads, strict=True):
        step = torch.randn_like(arguments[place])
        ends = [
            first(
                getattr(UNRECORDED, name)(
                    *(x + s * step if i == place else x for i, x in enumerate(arguments))
                )
            )
            for s in (-1e-3, 1e-3)
        ]
        change = ((ends[1].double() - ends[0].double()) * upstream.double()).sum().item() / 2e-3
        expected = (grad.double() * step.double()).sum().item()
        assert change == pytest.approx(expected, rel=2e-2, abs=2e-2)


def test_the_gradient_of_the_loss_is_its_direction_times_its_factor() -> None:
    arguments, _ = TRAINED["dmd_loss"]
    loss, direction, factor = UNRECORDED.dmd_loss(*arguments)
    x = arguments[0].clone().requires_grad_()
    recorded, *others = OPS.dmd_loss(x, *arguments[1:])
    assert torch.equal(recorded, loss)
    assert not any(other.requires_grad for other in others)
    (grad,) = torch.autograd.grad(recorded, x, torch.tensor(3.0))
    torch.testing.assert_close(grad, 3 * factor[:, None, None, None, None] * direction)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "rms_norm_silu"])
def test_second_derivatives_are_refused_by_name(name: str) -> None:
    arguments, places = TRAINED[name]
    given = [x.clone().requires_grad_() if i in places else x for i, x in enumerate(arguments)]
    out = first(getattr(OPS, name)(*given))
    grads = torch.autograd.grad(out.pow(2).sum(), [given[i] for i in places], create_graph=True)
    total = sum(grad.pow(2).sum() for grad in grads)
    assert isinstance(total, Tensor)
    with pytest.raises(NotImplementedError, match=f"{name}: .*derivative.* not implemented"):
        total.backward()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fused_linear", (X, [WEIGHT.expand(5, 8).clone().requires_grad_()], [], False, None, None)),
        ("rms_norm", (X, WEIGHT.clone().requires_grad_(), 1e-6)),
        ("region_saliency", (torch.ones(1, 1, 1, 3, 4, 4, requires_grad=True), 1, 2, 2)),
    ],
)
def test_ops_without_a_backward_refuse_one_by_name(name: str, arguments: tuple[Any, ...]) -> None:
    out = getattr(OPS, name)(*arguments)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match=f"{name}: .*derivative.* not implemented"):
        out.sum().backward()


def test_gradients_that_would_be_lost_are_refused() -> None:
    wants = LATENTS[1].clone().requires_grad_()
    with pytest.raises(ValueError, match="dmd_loss: fake"):
        OPS.dmd_loss(LATENTS[0], wants, LATENTS[2], None, 3.0, None, None, None)
    past = HEADS.clone().requires_grad_()
    with pytest.raises(ValueError, match="past"):
        OPS.cached_chunk_attention(HEADS, HEADS, HEADS, past, HEADS, 0.3)
    with pytest.raises(ValueError, match="k_out"):
        OPS.qk_norm_rotary_into(
            X.clone().requires_grad_(), X, WEIGHT, WEIGHT, *PHASES, 2, 1e-6, torch.zeros(2, 6, 2, 4)
        )


@pytest.mark.parametrize("write", ["keys", "gradient"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_autograd_notices_what_is_written(write: str, context: Callable[[], Any]) -> None:
    buffer = torch.zeros(2, 6, 2, 4) if write == "keys" else torch.zeros_like(LATENTS[0])
    product = (buffer * torch.ones_like(buffer).requires_grad_()).sum()
    with context():
        if write == "keys":
            qk_norm_rotary(X, X, WEIGHT, WEIGHT, *PHASES, num_heads=2, k_out=buffer)
        else:
            dmd_gradient_(buffer, *LATENTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_ops_by_their_public_names() -> None:
    with Seen() as seen, torch.no_grad():
        gated_add(X, X, GATE)
        chunk_attention(HEADS, HEADS, HEADS, ChunkMask(1, 3))
    assert "stream_r1.gated_add.default" in seen.names
    assert "stream_r1.chunk_attention.default" in seen.names


def test_fake_tensors_pass_outside_of_their_mode() -> None:
    with FakeTensorMode() as mode:
        x, gate = mode.from_tensor(X), mode.from_tensor(GATE)
    with torch.no_grad():
        out = gated_add(x, x, gate)
    assert out.shape == X.shape


def test_every_op_is_there_twice_with_the_same_schema() -> None:
    for schema in (*SCHEMAS, *GPU_SCHEMAS):
        name = schema.split("(")[0]
        texts = [str(getattr(ops, name).default._schema).split("::")[1] for ops in (OPS, UNRECORDED)]
        assert texts[0] == texts[1]
        assert torch.Tag.pt2_compliant_tag in getattr(OPS, name).default.tags
