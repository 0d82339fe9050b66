"""What the student does on GPUs in fewer passes over memory, on a CPU that is taken for one."""

import pytest
import torch
from torch.nn import functional

from stream_r1.estimate.devices import DEVICES
from stream_r1.estimate.streaming import as_on
from stream_r1.models import blocks
from stream_r1.models.blocks import Block, GELUProjection
from stream_r1.models.transformer import CausalWanTransformer

H100 = DEVICES["H100"]
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 1,
    "text_len": 6,
    "window_frames": 4,
    "frames_per_chunk": 2,
}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_norm_before_cross_attention(weight_dtype):
    torch.manual_seed(0)
    block = Block(24, 48, 2, True, 1e-6).bfloat16()
    block.norm2.to(weight_dtype)
    with torch.no_grad():
        block.norm2.weight.normal_()
        block.norm2.bias.normal_()
    x = (3 * torch.randn(2, 5, 24) + 1).bfloat16()
    norm = block.norm2
    exact = functional.layer_norm(x.double(), [24], norm.weight.double(), norm.bias.double(), norm.eps)
    plain = block.cross_norm(x)
    with as_on(H100):
        ours = block.cross_norm(x)
    assert ours.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps
    assert (ours - exact).abs().max() <= (plain - exact).abs().max() + unit * exact.abs().max() / 2


def test_gradients_reach_the_norm_before_cross_attention():
    torch.manual_seed(0)
    block, x = Block(24, 48, 2, True, 1e-6), torch.randn(2, 5, 24)
    upstream = torch.randn(2, 5, 24)
    leaves = (block.norm2.weight, block.norm2.bias)
    plain = torch.autograd.grad(block.cross_norm(x), leaves, upstream)
    with as_on(H100):
        ours = torch.autograd.grad(block.cross_norm(x), leaves, upstream)
    torch.testing.assert_close(ours, plain)


def chunk(student, batch, x, text):
    cache = student.new_cache(batch, 4, 6)
    cache.storage.zero_()
    student.forward_chunk(x, torch.tensor([500.0] * batch), text, cache)
    return cache.storage


@pytest.mark.parametrize("batch", [1, 2])
def test_values_are_written_into_their_slot_by_the_matmul(batch, monkeypatch):
    torch.manual_seed(0)
    student = CausalWanTransformer(**SIZES).eval()
    inputs = torch.randn(batch, 2, 4, 4, 6), torch.randn(batch, 6, 12)
    plain = chunk(student, batch, *inputs)
    written = []
    inner = blocks.write_projection
    monkeypatch.setattr(
        blocks, "write_projection", lambda out, *rest: (written.append(out.shape), inner(out, *rest))
    )
    with as_on(H100):
        torch.testing.assert_close(chunk(student, batch, *inputs), plain)
        assert written == [(batch, 12, 32)]
        student.blocks[0].attn1.to_v.register_forward_hook(lambda *_: None)  # has to be called then
        torch.testing.assert_close(chunk(student, batch, *inputs), plain)
    assert len(written) == 1


def test_gelu_in_the_matmul_is_of_what_the_layer_gives():
    """On a CPU the same call has the exact GELU: tests/gpu holds it against the tanh approximation."""
    torch.manual_seed(0)
    up, x = GELUProjection(24, 40), torch.randn(2, 5, 24)
    with torch.no_grad(), as_on(H100):
        torch.testing.assert_close(up(x), functional.gelu(up.proj(x)))
    with as_on(H100):  # autograd records: as ever
        torch.testing.assert_close(up(x), functional.gelu(up.proj(x), approximate="tanh"))
