"""The data flow of the published causal students, eager, as the baseline of the student's pass.

What the public implementations do in each pass of each layer (Self Forcing 2506.08009, Reward Forcing
2512.04678), on the weights of our student: keys are kept as they come from the norm; sink, window and fresh
chunk are concatenated; queries and the whole window are rotated in complex128; attention is torch's own. A
chunk's last pass rolls the window. Cross-attention keys are computed once a prompt, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stream_r1.models.blocks import Block, time_sinusoid
from stream_r1.models.contexts import TextContext
from stream_r1.models.patches import patchify, unpatchify
from stream_r1.models.transformer import CausalWanTransformer


class PublishedFlow:
    """Streams a `CausalWanTransformer` with window positions and a static sink the published way.

    Args:
        student: gives the weights; `window_frames`, `sink_frames` and `positions="window"` set, no average.
        rows, columns: tokens of a frame.
    """

    def __init__(self, student: CausalWanTransformer, rows: int, columns: int) -> None:
        config = student.config
        self.student, self.rows, self.columns = student, rows, columns
        self.heads, self.eps = config["num_attention_heads"], config["eps"]
        self.tokens = rows * columns  # of a frame
        self.window, self.sink = config["window_frames"], config["sink_frames"]
        self.relative = config["positions"] == "window"
        self.frames_seen = 0  # of finished chunks
        self.context: TextContext | None = None  # of the one prompt
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * len(
            student.blocks
        )  # [B, T, H, D], unrotated
        head = config["attention_head_dim"]
        axes = head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6)
        self.tables = [  # complex128 [1024, pairs] of frame, row, column
            torch.polar(
                torch.ones(1024, axis // 2, dtype=torch.float64),
                torch.arange(1024, dtype=torch.float64)[:, None]
                * 10000.0 ** -(torch.arange(0, axis, 2, dtype=torch.float64) / axis),
            )
            for axis in axes
        ]

    @torch.no_grad()
    def forward_chunk(self, x: Tensor, t: Tensor, text: Tensor, *, last: bool) -> Tensor:
        """One pass over the next chunk [B, F, C, h, w] at `t` [B, F]; `last` keeps its keys and values."""
        student, frames = self.student, x.shape[1]
        h = patchify(x, student.patch_embedding)
        embedder = student.condition_embedder
        net = embedder.time_embedder
        features = time_sinusoid(t, embedder.freq_dim).to(net.linear_1.weight.dtype)
        embedding = net.linear_2(functional.silu(net.linear_1(features))).to(h.dtype)
        time = embedder.time_proj(functional.silu(embedding)).unflatten(-1, (6, -1))  # [B, F, 6, D]
        context = self.context = self.context or student.encode_text(text)
        for layer, block in enumerate(student.blocks):
            h = self._block(layer, block, h, time, context.k[layer], context.v[layer], frames, last)
        if last:
            self.frames_seen += frames
        table = student.scale_shift_table.unsqueeze(0)
        shift, scale = (table + embedding.unsqueeze(2)).unbind(2)
        patches = student.proj_out(self._modulate(h, shift, scale, frames))
        return unpatchify(patches, student.config["patch_size"], self.rows, self.columns)

    def _block(
        self,
        layer: int,
        block: Block,
        x: Tensor,
        time: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        frames: int,
        last: bool,
    ) -> Tensor:
        e = (block.scale_shift_table.unsqueeze(0) + time).chunk(6, dim=2)
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (part.squeeze(2) for part in e)
        attended = self._self_attention(layer, block, self._modulate(x, shift, scale, frames), frames, last)
        x = x + (attended.unflatten(1, (frames, -1)) * gate.unsqueeze(2)).flatten(1, 2).to(x.dtype)
        norm = block.norm2
        y = functional.layer_norm(
            x.to(norm.weight.dtype), norm.normalized_shape, norm.weight, norm.bias, self.eps
        )
        x = x + self._cross_attention(block, y.to(x.dtype), text_k, text_v)
        hidden = block.ffn.net[0].proj(self._modulate(x, shift_ffn, scale_ffn, frames))
        y = block.ffn.net[2](functional.gelu(hidden, approximate="tanh"))
        return x + (y.unflatten(1, (frames, -1)) * gate_ffn.unsqueeze(2)).flatten(1, 2).to(x.dtype)

    def _modulate(self, x: Tensor, shift: Tensor, scale: Tensor, frames: int) -> Tensor:
        normed = functional.layer_norm(x, x.shape[-1:], eps=self.eps).unflatten(1, (frames, -1))
        return (normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(x.dtype)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * weight

    def _rotate(self, x: Tensor, first_frame: int) -> Tensor:
        """x [B, T, H, D], whole frames from `first_frame` on, rotated in complex128."""
        frames = x.shape[1] // self.tokens
        shape = (frames, self.rows, self.columns, -1)
        time, row, column = self.tables
        phases = torch.cat(
            [
                time[first_frame : first_frame + frames].view(frames, 1, 1, -1).expand(shape),
                row[: self.rows].view(1, self.rows, 1, -1).expand(shape),
                column[: self.columns].view(1, 1, self.columns, -1).expand(shape),
            ],
            dim=-1,
        ).reshape(frames * self.tokens, 1, -1)
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * phases).flatten(3).to(x.dtype)

    def _self_attention(self, layer: int, block: Block, h: Tensor, frames: int, last: bool) -> Tensor:
        attn = block.attn1
        q = self._rms(attn.to_q(h), attn.norm_q.weight).unflatten(-1, (self.heads, -1))
        k = self._rms(attn.to_k(h), attn.norm_k.weight).unflatten(-1, (self.heads, -1))
        v = attn.to_v(h).unflatten(-1, (self.heads, -1))
        kept = self.kept[layer]
        if kept is not None:
            past_k, past_v = kept
            room = (self.window - frames) * self.tokens
            if past_k.shape[1] > room:  # full: the chunk after the sink falls out
                sink = self.sink * self.tokens
                rest = past_k.shape[1] - (room - sink)
                past_k = torch.cat([past_k[:, :sink], past_k[:, rest:]], 1)
                past_v = torch.cat([past_v[:, :sink], past_v[:, rest:]], 1)
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
        if last:
            self.kept[layer] = k, v
        seen, visible = self.frames_seen + frames, k.shape[1] // self.tokens
        if self.relative or visible == seen:
            keys = self._rotate(k, 0)
        else:  # sink at its own frames, the rest at the last ones
            sink = self.sink * self.tokens
            keys = torch.cat(
                [self._rotate(k[:, :sink], 0), self._rotate(k[:, sink:], seen - visible + self.sink)], 1
            )
        first = (visible if self.relative else seen) - frames
        q, keys, v = (y.transpose(1, 2) for y in (self._rotate(q, first), keys, v))
        out = functional.scaled_dot_product_attention(q, keys, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def _cross_attention(self, block: Block, h: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        attn = block.attn2
        q = self._rms(attn.to_q(h), attn.norm_q.weight).unflatten(-1, (self.heads, -1))
        q, k, v = (y.transpose(1, 2) for y in (q, text_k, text_v))
        out = functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
