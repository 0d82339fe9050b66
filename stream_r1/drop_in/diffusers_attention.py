"""The attention ops inside diffusers' models.

`register_backend` adds "stream_r1" to diffusers' attention backends: dense attention of any model.
`set_chunk_mask` and `set_chunk_cache` replace the self-attention of a `WanTransformer3DModel`, which makes a
causal student of it: all chunks of a clip at once, or chunk after chunk of a stream. Normalisation and rotary
positions are then part of the replacement (`qk_norm_rotary`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stream_r1.models.module_weights import is_plain
from stream_r1_kernels import (
    ChunkCache,
    ChunkMask,
    LayerCache,
    apply_rotary,
    cached_chunk_attention,
    chunk_attention,
    qk_norm_rotary,
)
from stream_r1_kernels.graphs import integers_may_change

BACKEND = "stream_r1"


def register_backend() -> None:
    """Add "stream_r1" to the attention backends of diffusers; again is once.

    Then `model.set_attention_backend("stream_r1")` and `with attention_backend("stream_r1")` send a model's
    dense attention, self and cross, to `cached_chunk_attention`. Masks, dropout, grouped queries and context
    parallelism are refused when they come: `ValueError` names what came.

    diffusers has no public way to add a backend: this goes through its registry and the enumeration of its
    names, which a later diffusers may change.
    """
    from diffusers.models import attention_dispatch as dispatch

    names: Any = dispatch.AttentionBackendName
    if BACKEND in names._value2member_map_:
        return
    member = str.__new__(names, BACKEND)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[BACKEND] = member
    dispatch._AttentionBackendRegistry.register(member)(_dense_attention)


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: object = None,
) -> Tensor:
    """The dispatcher's arguments: query, key, value [B, T, H, D] -> [B, T, H, D]."""
    given = {
        "attn_mask": attn_mask is not None,
        "dropout_p": dropout_p != 0.0,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "return_lse": return_lse,
        "parallel_config": _parallel_config is not None,
    }
    if refused := [name for name, is_given in given.items() if is_given]:
        raise ValueError(
            f"attention backend {BACKEND!r}: expected dense attention without {', '.join(refused)}"
        )
    return cached_chunk_attention(query, key, value, None, scale=scale)


def set_chunk_mask(model: nn.Module, mask: ChunkMask) -> None:
    """Make the self-attention of a `WanTransformer3DModel` block-causal over whole clips.

    The model is called as always. A timestep per frame is given per token, [B, T], as diffusers' model takes
    it. With a teacher-forcing mask the latents are [clean | noisy] along the frames, and both halves are at
    the same positions. `restore_attention` undoes it.

    Args:
        model: diffusers' model; gradients, gradient checkpointing, LoRA and fused projections work.
        mask: its `tokens_per_frame` is (height / 2) (width / 2) of the latents.

    Raises:
        TypeError: a model without `blocks` that have an `attn1`.
    """
    for block in _blocks(model, "set_chunk_mask"):
        block.attn1.set_processor(MaskedProcessor(mask))


def set_chunk_cache(model: nn.Module, cache: ChunkCache) -> None:
    """Make the self-attention of a `WanTransformer3DModel` stream: one chunk a call, the past in `cache`.

    The model is called with a chunk's latents as if they were a whole clip; `cache` knows where in the video
    they are. The last pass without gradients before `cache.commit()` is what later chunks see. Where
    gradients flow the cache is only read, and nothing before the chunk gets any. `restore_attention` undoes
    it.

    Args:
        model: diffusers' model.
        cache: a layer a block, the model's heads and head width, the grid of its latents' tokens.

    Raises:
        TypeError: a model without `blocks` that have an `attn1`.
        ValueError: a cache with another number of layers; later, a chunk that does not fit, a chunk that was
            committed without a pass that wrote it, the model's own gradient checkpointing, or another one
            (`checkpoint_wrapper`) that computes a chunk again after the cache has moved on.
    """
    blocks = _blocks(model, "set_chunk_cache")
    if len(cache) != len(blocks):
        raise ValueError(f"set_chunk_cache: cache: expected {len(blocks)} layers, got {len(cache)}")
    stream = _Stream(model, cache)
    for block, layer in zip(blocks, cache.layers, strict=True):
        block.attn1.set_processor(CachedProcessor(stream, layer))


def restore_attention(model: nn.Module) -> None:
    """Give a `WanTransformer3DModel` diffusers' own self-attention back."""
    for block in _blocks(model, "restore_attention"):
        block.attn1.set_processor(block.attn1._default_processor_cls())


def _blocks(model: nn.Module, function: str) -> list[Any]:
    blocks = list(getattr(model, "blocks", []))
    if not blocks or not all(hasattr(block, "attn1") for block in blocks):
        raise TypeError(f"{function}: model: expected a WanTransformer3DModel, got {type(model).__name__}")
    return blocks


class _Processor:
    """What diffusers calls with an attention module and its input."""

    _parallel_config = None  # diffusers sets it for context parallelism

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, T, C], rotary_emb cos and sin [1, T, 1, D] -> [B, T, C]."""
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "parallel_config": self._parallel_config,
        }
        if refused := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{type(self).__name__}: expected plain self-attention without {', '.join(refused)}"
            )
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        out = self.attend(attn, q, k, v.unflatten(-1, (attn.heads, -1)), rotary_emb)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def attend(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def rotate(
        attn: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, k_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H * D], phases [T, D / 2] -> q, k [B, T, H, D]."""
        if is_plain(attn.norm_q, attn.norm_k):
            weights = attn.norm_q.weight, attn.norm_k.weight
            return qk_norm_rotary(
                q, k, *weights, cos, sin, num_heads=attn.heads, eps=attn.norm_q.eps, k_out=k_out
            )
        q = apply_rotary(attn.norm_q(q).unflatten(-1, (attn.heads, -1)), cos, sin)
        k = apply_rotary(attn.norm_k(k).unflatten(-1, (attn.heads, -1)), cos, sin)
        return q, k if k_out is None else k_out.copy_(k)


class MaskedProcessor(_Processor):
    def __init__(self, mask: ChunkMask) -> None:
        self.mask = mask

    def attend(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if rotary_emb is None:
            raise ValueError("set_chunk_mask: expected rotary positions with the self-attention, got none")
        # diffusers has every phase twice, for both channels of a pair
        cos, sin = (phases[0, :, 0, ::2] for phases in rotary_emb)  # [T, D / 2]
        if self.mask.teacher_forcing:
            half = cos.shape[0] // 2
            cos, sin = cos[:half].repeat(2, 1), sin[:half].repeat(2, 1)
        q, k = self.rotate(attn, q, k, cos, sin)
        return chunk_attention(q, k, v, self.mask)


class _Stream:
    """What the layers of a streaming model share: the cache, and whether its open chunk was written."""

    def __init__(self, model: nn.Module, cache: ChunkCache) -> None:
        self.model: Any = model
        self.cache = cache
        self.frame = cache.next_frame
        self.kept = False

    def enter(self, tokens: int, learns: bool) -> None:
        """Check what can't be seen from one layer, and begin the chunk."""
        cache = self.cache
        if (again := cache.moments.recomputed()) is not None:
            if again != "chunk":
                raise ValueError(
                    "set_chunk_cache: activation checkpointing computes a chunk again after the cache has "
                    f"moved on to frame {cache.next_frame}; run each chunk's backward before commit(), or "
                    "turn checkpointing off"
                )
            return
        if cache.next_frame != self.frame:
            if not self.kept and cache.next_frame > self.frame:
                raise ValueError(
                    f"set_chunk_cache: no pass without gradients has written frame {self.frame}, which is "
                    "committed; run a chunk's last pass under torch.no_grad()"
                )
            self.frame, self.kept = cache.next_frame, False
        if tokens != cache.frames * cache.tokens_per_frame:
            raise ValueError(
                f"set_chunk_cache: expected a chunk of {cache.frames} frames of {cache.rows} x "
                f"{cache.columns} tokens, got {tokens} tokens"
            )
        if learns and self.model.gradient_checkpointing:
            raise ValueError(
                "set_chunk_cache: expected no gradient checkpointing where gradients flow, as it would "
                "compute a chunk again after the cache has moved on"
            )
        cache.begin_chunk()


class CachedProcessor(_Processor):
    def __init__(self, stream: _Stream, layer: LayerCache) -> None:
        self.stream, self.layer = stream, layer

    @integers_may_change
    def attend(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        stream, layer = self.stream, self.layer
        weights = attn.norm_q.weight, attn.norm_k.weight
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *weights))
        stream.enter(v.shape[1], learns)
        phases = stream.cache.positions()
        if learns:
            q, k = self.rotate(attn, q, k, *phases)
            return cached_chunk_attention(
                q, k, v, layer.past(holds_fresh=False, copy=stream.cache.overwrites)
            )
        if torch.compiler.is_compiling():
            q, k = self.rotate(attn, q, k, *phases)
            layer.write(k, v)
        else:
            slot_k, slot_v = layer.slot()
            q, _ = self.rotate(attn, q, k, *phases, k_out=slot_k)
            slot_v.copy_(v)
        stream.kept = True
        return cached_chunk_attention(q, None, None, layer.past(holds_fresh=True))
