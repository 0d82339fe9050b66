"""Activation checkpointing with and without attention's results: the same gradients, and what runs again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stream_r1.distill.dmd import velocity
from stream_r1.models.recompute import _checkpoint_keeping, enable_checkpointing
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1_kernels import cached_chunk_attention

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
SIZES |= {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def chunks() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A student whose later chunks evict what earlier ones saw."""
    torch.manual_seed(0)
    stream = {"text_len": 8, "window_frames": 6, "sink_frames": 3, "positions": "window", "sink_ema": 0.9}
    student = CausalWanTransformer(**SIZES, **stream).train()

    def run() -> Tensor:
        text = student.encode_text(draw(1, 8, 16))
        cache, made = student.new_cache(1, 4, 6), []
        for x in draw(4, 1, 3, 4, 4, 6):
            with torch.no_grad():
                student.forward_chunk(x, torch.zeros(1), text, cache)
            made.append(student.forward_chunk(x, torch.full((1,), 500.0), text, cache, write=False))
            cache.commit()
        return torch.cat(made)

    return student, run


def clip() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """diffusers' critic, which attends by torch's own ops."""
    torch.manual_seed(0)
    critic = WanTransformer3DModel(**SIZES).train()
    return critic, lambda: velocity(critic, draw(1, 6, 4, 4, 6), torch.full((1,), 500.0), draw(1, 8, 16))


class Attentions(TorchDispatchMode):
    """Counts the calls of self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        fresh = args[1] if "attention" in name and "backward" not in name else None  # keys; None in sampling
        self.calls += fresh is not None and 8 not in fresh.shape[1:3]  # tokens of the text
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [chunks, clip])
@pytest.mark.parametrize("half", [False, True])
def test_the_same_gradients_bit_for_bit_and_attention_runs_once(make: Any, half: bool) -> None:
    gradients, again = [], []
    for keep in (False, True, None):
        model, run = make()
        if keep is not None:
            enable_checkpointing(model, keep_attention=keep)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = run().float().square().mean()
        with Attentions() as backward:
            loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters()]
        loss.backward()  # a graph that is kept can be gone through again
        torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in first])
        gradients.append(first)
        again.append(backward.calls)
    assert again == [2 if make is clip else 2 * 4, 0, 0]  # layers, and chunks
    assert all(g.norm() > 0 for g in gradients[0])
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


def test_a_result_that_was_written_to_is_refused() -> None:
    def block(q: Tensor) -> Tensor:
        out = cached_chunk_attention(q, q, q, None)
        with torch.no_grad():
            out.mul_(2)
        return out * 3

    q = draw(1, 4, 2, 16).requires_grad_()
    out = _checkpoint_keeping(block, q)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()
