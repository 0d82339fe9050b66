"""The causal student: a Wan video transformer that denoises a few latent frames at a time and remembers the
rest.

Parameter names and config keys are those of diffusers' `WanTransformer3DModel`: its folders load here and
ours load there. With one chunk over all frames the two compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from stream_r1.models.blocks import Block, ConditionEmbedder
from stream_r1.models.contexts import TextContext, TimeContext, per_frame
from stream_r1.models.modeling import ConfigMixin, ModelMixin, register_to_config
from stream_r1.models.module_weights import device_of, weight_of
from stream_r1.models.patches import patch_grid, patchify, token_grid, unpatchify
from stream_r1.models.sequence import SequenceParallel, TokenShare
from stream_r1.models.slots import take_slots
from stream_r1.models.wan import unsupported_setting
from stream_r1_kernels import ChunkCache, ChunkMask, Fp8ChunkCache, RotaryGrid, modulated_norm

# Parts that stay float32 when a model is loaded in half precision, as in diffusers.
FLOAT32_PARTS = ["time_embedder", "scale_shift_table", "norm2"]
REPEATED = ["Block"]


class CausalWanTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Causal video diffusion transformer (Wan 2.1 blocks, a timestep per latent frame, a streaming cache).

    The first 16 settings are diffusers' own. Ours:

    Args:
        text_len: text positions; shorter texts are padded with zero embeddings, and the padding is attended
            to, as in Wan.
        frames_per_chunk: latent frames denoised together.
        window_frames: frames a chunk sees, sink and itself included; None: everything before it.
        sink_frames: first frames that stay visible indefinitely.
        positions: "absolute" (Self Forcing) or "window" (Reward Forcing, Stream-R1), see `ChunkCache`.
        sink_ema: decay of the sink's moving average; None: the sink stays as it was.
        first_chunk_frames: frames of the first chunk where it differs (1: independent first frame).
        quantization: None. The config of a quantised student says "fp8"; `load_student` reads its weights.

    Raises:
        ValueError: settings of diffusers' that this student has no use for (image conditioning, no qk norm),
            or sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    blocks: Sequence[Block]
    condition_embedder: ConditionEmbedder
    patch_embedding: nn.Conv3d

    _no_split_modules = REPEATED  # type: ignore[assignment]
    _repeated_blocks = REPEATED
    _keep_in_fp32_modules = FLOAT32_PARTS  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        text_len: int = 512,
        frames_per_chunk: int = 3,
        window_frames: int | None = None,
        sink_frames: int = 0,
        positions: str = "absolute",
        sink_ema: float | None = None,
        first_chunk_frames: int | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        if (problem := unsupported_setting(self.config)) is not None:
            raise ValueError(f"CausalWanTransformer: {problem}")
        if quantization is not None:
            raise ValueError(
                "CausalWanTransformer: quantization must be None, as FP8 weights are read by load_student "
                f"with quantize='fp8' or 'fp8-emulated', got {quantization!r}"
            )
        dim = num_attention_heads * attention_head_dim

        self.rotary = RotaryGrid(attention_head_dim)
        patch = (1, patch_size[1], patch_size[2])
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            [Block(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps) for _ in range(num_layers)]
        )
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.sequence: SequenceParallel | None = None
        # Settings that no cache could follow are refused here, not when a stream begins.
        self._make_cache(ChunkCache, 1, 0, 1, 1, max_frames=frames_per_chunk, device="meta")

    def enable_sequence_parallel(self, sequence: SequenceParallel) -> None:
        """From now on passes are shared by processes, all of which make the same ones on the same latents.

        Each has the whole latents, text and result; tokens and the heads of keys and values are divided.

        Raises:
            ValueError: heads that the processes can't share evenly.
        """
        sequence.check_heads("CausalWanTransformer", self.config["num_attention_heads"])
        self.sequence = sequence

    def encode_text(self, embeds: Tensor) -> TextContext:
        """Cross-attention keys and values of a prompt, for every layer: once a prompt, not once a step.

        Args:
            embeds: text embeddings [B, L, text_dim] with L <= text_len; missing positions are zeros.

        Returns:
            `TextContext`, differentiable with respect to the weights and `embeds` when grad is on.

        Raises:
            ValueError: another shape.
        """
        length, width = self.config["text_len"], self.config["text_dim"]
        if embeds.ndim != 3 or embeds.shape[2] != width or embeds.shape[1] > length:
            raise ValueError(
                f"CausalWanTransformer.encode_text: embeds must be [B, L <= {length}, {width}], "
                f"got {list(embeds.shape)}"
            )
        embeds = functional.pad(embeds.to(self.dtype), (0, 0, 0, length - embeds.shape[1]))
        text = self.condition_embedder.text(embeds)
        k, v = zip(*(block.text_keys_values(text) for block in self.blocks), strict=True)
        return TextContext(k, v)

    def encode_time(self, t: Tensor) -> TimeContext:
        """Timesteps [B, F] or [B], in [0, 1000], as every layer reads them: once for all passes at them.

        Raises:
            ValueError: another shape.
        """
        if t.ndim not in (1, 2):
            raise ValueError(f"CausalWanTransformer.encode_time: t must be [B] or [B, F], got {t.ndim} dims")
        t = t if t.ndim == 2 else t.unsqueeze(1)
        embedding, time = self.condition_embedder.time(t, self.patch_embedding.weight.dtype)
        blocks = tuple(block.modulation(time) for block in self.blocks)
        return TimeContext(blocks, self._head_modulation(embedding))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: TextContext | Tensor,
        *,
        mask: ChunkMask | Literal["causal"] | None = None,
        clean_x: Tensor | None = None,
    ) -> Tensor:
        """The velocity of a whole clip at once.

        Args:
            x: noisy latents [B, F, C, h, w].
            t: timesteps in [0, 1000], [B, F] or [B].
            text: a `TextContext`, or text embeddings as for `encode_text`; its batch is B or 1.
            mask: who sees whom; "causal": what a stream with this model's settings would see at absolute
                positions; None: every frame sees every frame (teacher, critic).
            clean_x: clean latents [B, F, C, h, w] for teacher forcing: the sequence becomes [clean | noisy],
                the clean half at t = 0, and a noisy chunk sees the clean chunks before it and itself. Needs a
                mask.

        Returns:
            v [B, F, C, h, w], in the dtype of `x`.

        Raises:
            ValueError: shapes or a mask that do not fit.
        """
        batch, frames, rows, columns = self._check_latents("forward", x)
        t = per_frame("CausalWanTransformer.forward", t, batch, frames)
        if isinstance(mask, str):
            if mask != "causal":
                raise ValueError(
                    f"CausalWanTransformer.forward: mask must be a ChunkMask, 'causal' or None, got {mask!r}"
                )
            mask = self.causal_mask(rows * columns, teacher_forcing=clean_x is not None)
        if (clean_x is not None) != (mask is not None and mask.teacher_forcing):
            raise ValueError(
                "CausalWanTransformer.forward: clean_x and a mask with teacher_forcing=True need each other"
            )

        share = self._share("forward", rows, columns)
        h = patchify(x, self.patch_embedding, share)
        cos, sin = self.rotary.phases(0, frames, rows, columns, x.device)
        if share is not None:
            cos, sin = share.own(cos, dim=0), share.own(sin, dim=0)
        if clean_x is not None:
            if clean_x.shape != x.shape:
                raise ValueError(
                    f"CausalWanTransformer.forward: clean_x must have x's shape {list(x.shape)}, "
                    f"got {list(clean_x.shape)}"
                )
            h = torch.cat((patchify(clean_x, self.patch_embedding, share), h), dim=1)
            t = t.expand(batch, frames)
            t = torch.cat((torch.zeros_like(t), t), dim=1)
            cos, sin = cos.repeat(2, 1), sin.repeat(2, 1)
        text = self._as_context("forward", text, batch)
        embedding, time = self.condition_embedder.time(t, h.dtype)
        for block, text_k, text_v in zip(self.blocks, text.k, text.v, strict=True):
            h = self._run(block, h, time, text_k, text_v, cos, sin, mask, None, (), False, share)
        if clean_x is not None:
            h, embedding = h[:, h.shape[1] // 2 :], embedding[:, frames:]
        return self._head(h, self._head_modulation(embedding), rows, columns, share).to(x.dtype)

    def forward_chunk(
        self,
        x: Tensor,
        t: Tensor | TimeContext,
        text: TextContext | Tensor,
        cache: ChunkCache,
        *,
        write: bool = True,
        clean: Tensor | None = None,
    ) -> Tensor:
        """The velocity of the chunk that comes next in a stream.

        Args:
            x: noisy latents [B, cache.frames, C, h, w].
            t: timesteps in [0, 1000], [B, f] or [B] (cheaper where a chunk has one); or what `encode_time`
                made of them, where many passes share them.
            text: as for `forward`; pass a `TextContext`, so that it is computed once.
            cache: from `new_cache`. `cache.begin_chunk()` runs if it has not; `cache.commit()` is the
                caller's.
            write: True (sampling, clean pass): no grad, the fresh keys and values go into their slot. False
                (a step with grad): they stay arguments, the cache is only read, and gradients reach nothing
                before this chunk.
            clean: latents [B, f', C, h, w] of the chunk under way, at the first f' timesteps of `t`: their
                pass, `cache.commit()` and the pass over `x` run as one, exactly as one after the other. Needs
                `write`, `t` [B, f' + f] and `cache.keeps_last`.

        Returns:
            v [B, f, C, h, w], in the dtype of `x`.

        Raises:
            ValueError: shapes that do not fit the cache, or a cache that `clean` can't be used with.
        """
        if clean is not None and not (write and cache.keeps_last):
            raise ValueError(
                "CausalWanTransformer.forward_chunk: clean needs write=True and a cache that keeps the last "
                f"chunk beside the next, got write={write} and a window of {cache.window_frames} frames"
            )
        if write:
            with torch.no_grad():
                return self._chunk([x] if clean is None else [clean, x], t, text, cache, True)
        return self._chunk([x], t, text, cache, False)

    def _chunk(
        self,
        chunks: list[Tensor],
        t: Tensor | TimeContext,
        text: TextContext | Tensor,
        cache: ChunkCache,
        write: bool,
    ) -> Tensor:
        for place, x in enumerate(chunks):
            shape = self._check_latents("forward_chunk", x)
            length = cache.frames_per_chunk if place > 0 else cache.frames
            if shape != (expected := (cache.batch, length, cache.rows, cache.columns)):
                raise ValueError(
                    "CausalWanTransformer.forward_chunk: the cache expects (batch, frames, rows, columns) = "
                    f"{expected} of the next chunk, got {shape} from latents {list(x.shape)}"
                )
        batch, frames, rows, columns = shape
        joined = len(chunks) > 1
        share = self._share("forward_chunk", rows, columns)
        h = patchify(torch.cat(chunks, dim=1) if joined else x, self.patch_embedding, share)
        total = sum(chunk.shape[1] for chunk in chunks)
        text = self._as_context("forward_chunk", text, batch)
        if modulated := isinstance(t, TimeContext):
            times, head = list(t.blocks), t.head
            t.check("CausalWanTransformer.forward_chunk", len(self.blocks), batch, total)
        else:
            t = per_frame("CausalWanTransformer.forward_chunk", t, batch, total)
            embedding, time = self.condition_embedder.time(t, h.dtype)
            times, head = [time] * len(self.blocks), self._head_modulation(embedding)
        cos, sin, slots = take_slots(cache, len(chunks))
        if share is not None:
            cos, sin = share.own(cos, dim=0), share.own(sin, dim=0)
        snapshot = torch.is_grad_enabled() and cache.evicts
        for block, time, layer, own, text_k, text_v in zip(
            self.blocks, times, cache.layers, slots, text.k, text.v, strict=True
        ):
            if write:
                h = block(h, time, text_k, text_v, cos, sin, None, None, own, modulated, share)
            else:
                past = layer.past(holds_fresh=False, copy=snapshot)
                h = self._run(block, h, time, text_k, text_v, cos, sin, None, past, (), modulated, share)
        return self._head(h, head[:, -frames:], rows, columns, share).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        max_frames: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> ChunkCache:
        """An empty cache for a stream of latents `height` x `width`.

        Args:
            max_frames: latent frames the stream can get to; needed by a model without a window. With one, a
                chunk whose past no later chunk will evict is learnt from without a copy of that past.
            dtype: of the keys and values; None: that in which the model computes, autocast included;
                torch.float8_e4m3fn: kept in FP8, read in the one in which the model computes.
        """
        patch = self.patch_embedding.kernel_size
        rows, columns = patch_grid("CausalWanTransformer.new_cache", height, width, patch)
        device = device_of(self, self.device)
        kind, in_fp8 = device.type, dtype == torch.float8_e4m3fn
        if dtype is None or in_fp8:
            autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else self.dtype
        sizes = (len(self.blocks), batch, rows, columns)
        cache = Fp8ChunkCache if in_fp8 else ChunkCache
        return self._make_cache(cache, *sizes, max_frames=max_frames, dtype=dtype, device=device)

    def _make_cache(
        self, cache: type[ChunkCache], layers: int, batch: int, rows: int, columns: int, **options: Any
    ) -> ChunkCache:
        config = self.config
        heads = config["num_attention_heads"] // (1 if self.sequence is None else self.sequence.size)
        return cache(
            *(layers, batch, heads, self.rotary, rows, columns, config["frames_per_chunk"]),
            window_frames=config["window_frames"],
            sink_frames=config["sink_frames"],
            positions=config["positions"],
            ema=config["sink_ema"],
            first_chunk_frames=config["first_chunk_frames"],
            **options,
        )

    def causal_mask(self, tokens_per_frame: int, *, teacher_forcing: bool = False) -> ChunkMask:
        """The mask over a whole clip under which each chunk sees what it would see in a stream.

        A `ChunkMask` counts its window without the sink, this model's `window_frames` with it.
        """
        window, sink = self.config["window_frames"], self.config["sink_frames"]
        return ChunkMask(
            tokens_per_frame=tokens_per_frame,
            frames_per_chunk=self.config["frames_per_chunk"],
            window_frames=None if window is None else window - sink,
            sink_frames=0 if window is None else sink,
            first_chunk_frames=self.config["first_chunk_frames"],
            teacher_forcing=teacher_forcing,
        )

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)  # type: ignore[misc]
        return block(*inputs)

    def _head_modulation(self, embedding: Tensor) -> Tensor:
        """The time embedding [B, F, D] -> shift and scale of the head, [B, F, 2, D]."""
        table = weight_of(self, "scale_shift_table").unsqueeze(0)
        return table + embedding.unsqueeze(2).to(table.dtype)

    def _share(self, where: str, rows: int, columns: int) -> TokenShare | None:
        """How the tokens of frames are shared; None: they are not."""
        where = f"CausalWanTransformer.{where}"
        return None if self.sequence is None else self.sequence.divide(where, rows, columns)

    def _head(
        self, h: Tensor, modulation: Tensor, rows: int, columns: int, share: TokenShare | None
    ) -> Tensor:
        """Tokens [B, T, D] and the head's modulation [B, F, 2, D] -> [B, F, C, h, w]."""
        shift, scale = modulation.unbind(2)
        patches = self.proj_out(modulated_norm(h, shift, scale, eps=self.config["eps"]))
        if share is not None:
            patches = share.whole(patches)
        return unpatchify(patches, self.patch_embedding.kernel_size, rows, columns)

    def _check_latents(self, where: str, x: Tensor) -> tuple[int, int, int, int]:
        patch = self.patch_embedding.kernel_size
        return token_grid(f"CausalWanTransformer.{where}", x, self.config["in_channels"], patch)

    def _as_context(self, where: str, text: TextContext | Tensor, batch: int) -> TextContext:
        # The class's own function: a model in parts has its weights already, and would let them go again.
        context = text if isinstance(text, TextContext) else CausalWanTransformer.encode_text(self, text)
        return context.fitting(f"CausalWanTransformer.{where}", len(self.blocks), batch)
