"""The parts of a causal Wan transformer, under the parameter names of diffusers' `WanTransformer3DModel`.

Shapes: B batch, F latent frames, T tokens (T = F * rows * columns), D width, H heads, L text positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from stream_r1.models.fp8 import Fp8Linear
from stream_r1.models.module_weights import is_plain, weight_of
from stream_r1.models.sequence import TokenShare
from stream_r1.models.slots import FreshSlot
from stream_r1_kernels import (
    ChunkMask,
    Past,
    QuantizedRows,
    apply_rotary,
    cached_chunk_attention,
    chunk_attention,
    fused_linear,
    gated_add,
    modulated_norm,
    modulated_norm_fp8,
    qk_norm_rotary,
    quantize_rows,
    rms_norm,
)
from stream_r1_kernels.backends import device_type, resolve

# Types of inputs and of weights that are nothing but tensors. What GPUs do is also counted on fake ones.
_PLAIN = {"cpu": ((Tensor,), (nn.Parameter,)), "cuda": ((Tensor, FakeTensor), (nn.Parameter, FakeTensor))}


def plain_linears(
    x: Tensor, *layers: nn.Module, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights and biases of linear layers that may run on `x` as one op with what follows them, else None.

    They may on `device` without grad, with weights as they are: no adapter, no other kind of layer, no hook,
    no part of a divided or an offloaded model, no autocast.
    """
    inputs, parameters = _PLAIN[device]
    if (
        type(x) not in inputs
        or device_type(x) != device
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(device)
    ):
        return None
    weights: list[Tensor] = []  # torch.compile does not trace list[Tensor]()
    biases: list[Tensor] = []
    for layer in layers:
        if type(layer) is not nn.Linear or not is_plain(layer):
            return None
        weight, bias = layer.weight, layer.bias  # once: a module looks them up slowly
        if type(weight) not in parameters or weight.dtype != x.dtype or bias is None:
            return None
        weights.append(weight)
        biases.append(bias)
    return weights, biases


def norm_for(layer: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor | QuantizedRows:
    """`modulated_norm` as a linear layer reads it: [B, T, D], or in FP8 for one that multiplies in it."""
    norm = modulated_norm_fp8 if isinstance(layer, Fp8Linear) else modulated_norm
    return norm(x, shift, scale, eps=eps)


def project(x: Tensor | QuantizedRows, *layers: nn.Module) -> Sequence[Tensor]:
    """x [B, T, K] through each of the linear layers -> [B, T, N] each, last dimension contiguous."""
    if isinstance(layers[0], Fp8Linear):
        x = layers[0].quantize(x)  # once for all
        return [layer(x) for layer in layers]
    assert isinstance(x, Tensor)
    if (plain := plain_linears(x, *layers)) is None:
        return [layer(x) for layer in layers]
    side_by_side = fused_linear(x, *plain)
    return side_by_side.split([weight.shape[0] for weight in plain[0]], dim=-1)


def add_projection(
    x: Tensor, y: Tensor | QuantizedRows, layer: nn.Module, gate: Tensor | None = None
) -> Tensor:
    """x + layer(y) * gate: x [B, T, D], y [B, T, K], gate [B, F, D] or 1."""
    if isinstance(y, Tensor) and x.dtype == y.dtype and (plain := plain_linears(y, layer)) is not None:
        return fused_linear(y, *plain, residual=x, gate=gate)
    return x + layer(y) if gate is None else gated_add(x, layer(y), gate)


def write_projection(out: Tensor, x: Tensor, layer: nn.Linear) -> None:
    """out [B, T, N] = layer(x [B, T, K]), by matmuls that write there; the samples of out are contiguous."""
    for sample, place in zip(x.unbind(), out.unbind(), strict=True):
        torch.addmm(layer.bias, sample, layer.weight.t(), out=place)


class RMSScale(nn.Module):
    """The weight of an RMSNorm over the full width, taken before the head split."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, eps: float) -> Tensor:
        """[B, T, D], in float32 inside, in x's dtype: for cross-attention, where nothing is rotated."""
        return rms_norm(x, self.weight, eps=eps)


class Attention(nn.Module):
    """Projections of one attention; who attends to what is the block's affair."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSScale(dim)
        self.norm_k = RMSScale(dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class GELUProjection(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor | QuantizedRows, *, in_fp8: bool = False) -> Tensor | QuantizedRows:
        """x [B, T, D] -> [B, T, hidden], in FP8 for a layer that multiplies in it."""
        if in_fp8:
            return quantize_rows(self.proj(x), gelu=True)
        if isinstance(x, Tensor) and (plain := plain_linears(x, self.proj)) is not None:
            return fused_linear(x, *plain, gelu=True)
        if isinstance(x, Tensor) and plain_linears(x, self.proj, device="cuda") is not None:
            # In the matmul's epilogue. On GPUs alone: there its GELU is the tanh approximation on all paths
            # (github.com/pytorch/pytorch/pull/104061), on CPUs the exact one.
            weight, bias = self.proj.weight, self.proj.bias
            out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
            return out.unflatten(0, x.shape[:-1])
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # Index 1 is a dropout in diffusers: it has no parameters, but it counts.
        self.net = nn.ModuleList([GELUProjection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])


class TwoLayers(nn.Module):
    """`linear_1`, an activation, `linear_2`."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, dim)
        self.linear_2 = nn.Linear(dim, dim)


def time_sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features of timesteps: `t` of any shape, in [0, 1000] -> float32 `[*t.shape, dim]`, cosines
    first.

    Computed in float64 as in Wan: a float32 phase near 1000 is off by 3e-5 rad.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=t.device)
    phase = t.double().unsqueeze(-1) * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat((phase.cos(), phase.sin()), dim=-1).float()


class ConditionEmbedder(nn.Module):
    """Timesteps and text, brought to the transformer's width."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim)

    def time(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`t` [B, F] -> the embedding [B, F, D] (head) and its projection [B, F, 6, D] (blocks)."""
        net = self.time_embedder
        features = time_sinusoid(t, self.freq_dim).to(net.linear_1.weight.dtype)
        embedding = net.linear_2(functional.silu(net.linear_1(features))).to(dtype)
        return embedding, self.time_proj(functional.silu(embedding)).unflatten(-1, (6, -1))

    def text(self, embeds: Tensor) -> Tensor:
        """`embeds` [B, L, text_dim] -> [B, L, D]."""
        net = self.text_embedder
        return net.linear_2(functional.gelu(net.linear_1(embeds), approximate="tanh"))


class Block(nn.Module):
    """A Wan block: self-attention, cross-attention to the text, feed-forward; AdaLN with a t per frame."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.attn1 = Attention(dim, num_heads)
        self.attn2 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, L, D] -> this block's cross-attention keys and values, [B, L, H, D / H] each."""
        attn = self.attn2
        k = attn.norm_k(attn.to_k(text), self.eps)
        return attn.split_heads(k), attn.split_heads(attn.to_v(text))

    def modulation(self, time: Tensor) -> Tensor:
        """The projected time embedding [B, F, 6, D] -> shifts, scales and gates of this block, as it."""
        table = weight_of(self, "scale_shift_table")  # what encodes times calls it outside of forward
        return table.unsqueeze(0) + time.to(table.dtype)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: ChunkMask | None = None,
        past: Past | None = None,
        slots: Sequence[FreshSlot] = (),
        modulated: bool = False,
        share: TokenShare | None = None,
    ) -> Tensor:
        """`x` [B, T, D], `time` [B, F, 6, D] (F may be 1), rotary phases [T, D / H / 2] -> [B, T, D].

        `modulated`: `time` is what `modulation` made of it. `share`: x and the phases are of this rank's
        tokens, slots and past of its heads.

        Self-attention follows `mask` over the sequence, or runs on `slots` (sampling: the chunks of `x` one
        after the other, whose keys and values are written there), or sees `past` and itself (training); with
        none of them every token sees every token. Tokens of slots that nobody asks for end there.
        """
        # The class's own function: a block of a divided model would let its weights go after the method.
        time = time if modulated else Block.modulation(self, time)
        shift1, scale1, gate1, shift2, scale2, gate2 = time.unbind(2)  # [B, F, D] each

        h = norm_for(self.attn1.to_q, x, shift1, scale1, self.eps)
        attended = self.self_attention(h, cos, sin, mask, past, slots, share)
        if attended.shape[1] < x.shape[1]:
            kept, frames = attended.shape[1], max(1, time.shape[1] * attended.shape[1] // x.shape[1])
            x = x[:, -kept:]
            gate1, shift2, scale2, gate2 = (part[:, -frames:] for part in (gate1, shift2, scale2, gate2))
        x = add_projection(x, attended, self.attn1.to_out[0], gate1)
        attended = self.cross_attention(self.cross_norm(x), text_k, text_v)
        x = add_projection(x, attended, self.attn2.to_out[0])
        up: Any = self.ffn.net[0]
        down = self.ffn.net[2]
        h = norm_for(up.proj, x, shift2, scale2, self.eps)
        hidden = up(h, in_fp8=True) if isinstance(down, Fp8Linear) else up(h)
        return add_projection(x, hidden, down, gate2)

    def self_attention(
        self,
        h: Tensor | QuantizedRows,
        cos: Tensor,
        sin: Tensor,
        mask: ChunkMask | None,
        past: Past | None,
        slots: Sequence[FreshSlot],
        share: TokenShare | None,
    ) -> Tensor:
        """h [B, T, D] -> what its heads gathered, [B, T, D], not yet projected; of slots, the asked for."""
        attn = self.attn1
        if slots and share is None:
            return self.attend_in_slots(h, cos, sin, slots)
        q, k, v = project(h, attn.to_q, attn.to_k, attn.to_v)
        v = attn.split_heads(v)
        q, k = self.rotate(q, k, cos, sin)
        if share is not None:
            q, k, v = share.by_heads(q, k, v)
        if slots:
            attended = self.attend_written(q, k, v, slots)
        elif mask is not None:
            attended = chunk_attention(q, k, v, mask)
        else:
            attended = cached_chunk_attention(q, k, v, past)
        if share is not None:
            attended = share.by_tokens(attended)
        return attended.flatten(2)

    def attend_in_slots(
        self, h: Tensor | QuantizedRows, cos: Tensor, sin: Tensor, slots: Sequence[FreshSlot]
    ) -> Tensor:
        """h [B, T, D] -> [B, T, D] of the chunks that are asked for."""
        attn = self.attn1
        first = slots[0].views_to_write()
        if (
            isinstance(h, Tensor)
            and first is not None
            and first[1].dtype == h.dtype
            and plain_linears(h, attn.to_v, device="cuda") is not None
        ):  # their matmul writes the values into the slot: v is what it makes them of
            (q, k), v, writes_values = project(h, attn.to_q, attn.to_k), h, True
        else:
            (q, k, v), writes_values = project(h, attn.to_q, attn.to_k, attn.to_v), False
        chunks = [(q, k, v, cos, sin)]
        if len(slots) > 1:
            tokens = [slot.place.stop - slot.place.start for slot in slots]
            parts = (*(part.split(tokens, 1) for part in (q, k, v)), cos.split(tokens), sin.split(tokens))
            chunks = list(zip(*parts, strict=True))
        attended = []
        for slot, (q, k, v, cos, sin) in zip(slots, chunks, strict=True):
            if slot.open is not None:
                slot.open()
            if (views := slot.views_to_write()) is None:
                q, k = self.rotate(q, k, cos, sin)
                visible = slot.write(k, attn.split_heads(v))
            else:
                slot_k, slot_v, visible = views
                q, _ = self.rotate(q, k, cos, sin, slot_k)
                if writes_values:
                    write_projection(slot_v.flatten(2), v, attn.to_v)
                else:
                    slot_v.copy_(attn.split_heads(v))
            if slot.asked:
                attended.append(cached_chunk_attention(q, None, None, visible).flatten(2))
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)

    def attend_written(self, q: Tensor, k: Tensor, v: Tensor, slots: Sequence[FreshSlot]) -> Tensor:
        """Rotated q, k and v [B, T, H, D] -> [B, T, H, D] of the chunks that are asked for."""
        tokens, attended = [slot.place.stop - slot.place.start for slot in slots], []
        chunks = zip(*(part.split(tokens, 1) for part in (q, k, v)), strict=True)
        for slot, (q, k, v) in zip(slots, chunks, strict=True):
            if slot.open is not None:
                slot.open()
            visible = slot.write(k, v)
            if slot.asked:
                attended.append(cached_chunk_attention(q, None, None, visible))
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)

    def rotate(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, k_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        attn = self.attn1
        if is_plain(attn.norm_q, attn.norm_k):
            weights = attn.norm_q.weight, attn.norm_k.weight
            return qk_norm_rotary(
                q, k, *weights, cos, sin, num_heads=self.num_heads, eps=self.eps, k_out=k_out
            )
        q = apply_rotary(attn.split_heads(attn.norm_q(q, self.eps)), cos, sin)
        k = apply_rotary(attn.split_heads(attn.norm_k(k, self.eps)), cos, sin)
        return q, k if k_out is None else k_out.copy_(k)

    def cross_norm(self, x: Tensor) -> Tensor:
        norm = self.norm2
        if type(norm) is nn.LayerNorm and is_plain(norm) and resolve("auto", "modulated_norm", x) == "cuda":
            # one pass over x, not three
            shift, scale = norm.bias.float(), norm.weight.float() - 1
            one_frame = (x.shape[0], 1, -1)
            return modulated_norm(x, shift.expand(one_frame), scale.expand(one_frame), eps=norm.eps)
        if not isinstance(norm, nn.LayerNorm) or norm.weight.dtype == x.dtype:
            return norm(x)
        return norm(x.to(norm.weight.dtype)).to(x.dtype)

    def cross_attention(self, h: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        """h [B, T, D], text_k and text_v [B, L, H, D / H] -> [B, T, D], not yet projected."""
        attn = self.attn2
        (q,) = project(h, attn.to_q)
        q = attn.split_heads(attn.norm_q(q, self.eps))
        if device_type(q) == "cpu" and q.dtype == text_k.dtype:  # on GPUs torch's own is the faster one
            return cached_chunk_attention(q, text_k, text_v, None).flatten(2)
        # scaled_dot_product_attention wants [B, H, T, D / H]
        q, k, v = q.transpose(1, 2), text_k.transpose(1, 2), text_v.transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
