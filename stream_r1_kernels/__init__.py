"""Ops for streaming video diffusion and its distillation. Needs torch and nothing else.

Attention (`[B, T, H, D]`):
    ChunkMask, chunk_attention             all chunks at once, block-causal; window, sink, teacher forcing
    RangeMask                              a mask of your own: which ranges of keys a block of queries sees
    Past, cached_chunk_attention           one chunk against what came before it
    ChunkCache, LayerCache                 sink and ring of past frames, one buffer a layer
    Fp8ChunkCache                          the same with keys and values in 8 bits
    RotaryGrid, qk_norm_rotary             positions without a table; norm, head split and rotary in one
Around the matmuls (`[B, T, D]`):
    modulated_norm, gated_add              AdaLN with a modulation per frame
    fused_linear                           linear layers with their activation or gated residual
    rms_norm                               norm of queries that are not rotated
    rms_norm_silu                          norm and activation before an autoencoder's causal convolution
    quantize_rows, modulated_norm_fp8      rows in FP8 with a scale each, and what multiplies them
    QuantizedRows, multiply_rows
Distillation (`[B, F, C, h, w]`):
    region_saliency, intra_weights         from a reward's pixel gradients to the weights of the latent cells
    dmd_loss, dmd_gradient_                the weighted DMD loss; its gradient, added to a buffer

Every op takes `backend="auto" | "cpu" | "cuda" | "triton" | "sdpa" | "reference"` (sdpa: attention by torch's
own); `python -m stream_r1_kernels.info` says what can run here, `backends.explain` what auto takes and why.
"""

from .attention import ChunkMask, Past, RangeMask, cached_chunk_attention, chunk_attention
from .cache import ChunkCache
from .cache_fp8 import Fp8ChunkCache
from .dmd import dmd_gradient_, dmd_loss
from .fp8 import QuantizedRows, modulated_norm_fp8, multiply_rows, quantize_rows
from .layer_cache import LayerCache
from .linear import fused_linear
from .norm import gated_add, modulated_norm, rms_norm, rms_norm_silu
from .rotary import RotaryGrid, apply_rotary, qk_norm_rotary
from .saliency import intra_weights, region_saliency

__all__ = [
    "ChunkCache",
    "ChunkMask",
    "Fp8ChunkCache",
    "LayerCache",
    "Past",
    "QuantizedRows",
    "RangeMask",
    "RotaryGrid",
    "apply_rotary",
    "cached_chunk_attention",
    "chunk_attention",
    "dmd_gradient_",
    "dmd_loss",
    "fused_linear",
    "gated_add",
    "intra_weights",
    "modulated_norm",
    "modulated_norm_fp8",
    "multiply_rows",
    "qk_norm_rotary",
    "quantize_rows",
    "region_saliency",
    "rms_norm",
    "rms_norm_silu",
]
