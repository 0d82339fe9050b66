"""Every op of stream_r1_kernels. Attention is laid out [B, T, H, D], latents [B, F, C, h, w].

Kernels are in csrc/cpu/<op>.cpp and csrc/cuda/*_bindings.cpp, shapes for tracing in <family>/fake.py,
gradients in <family>/autograd.py. Schemas are not in C++: libtorch's stable ABI knows tags from 2.12 on only.
So setup.py records them beside the extension, and `backends` refuses one that was built for others.
"""

SCHEMAS = (
    # The instruction set that the CPU kernels run with on this machine.
    "cpu_isa() -> str",
    # Attention of a chunk to the past and to itself, without any mask: the keys are [past | fresh], either
    # may be absent. out [B, T, H, D], lse [B, H, T] float64 on a CPU, else float32. No gradient for the past.
    "cached_chunk_attention(Tensor q, Tensor? k, Tensor? v, Tensor? past_k, Tensor? past_v, float "
    "scale) -> (Tensor out, Tensor lse)",
    "cached_chunk_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? past_k, Tensor? past_v, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    # Once a chunk of a streaming cache: the evicted chunk at token `slot` is averaged into the kept sink, and
    # the sink that the next chunk sees is written. storage [L, 2, B, T, H, D], sinks [L, B, S, H, D], phases
    # [D / 2]. CUDA alone: elsewhere the cache does it in torch.
    "renew_sink_(Tensor(a!) storage, Tensor(b!) sink_k, Tensor(c!)? sink_v, int slot, float? ema, bool "
    "first, Tensor evicted_cos, Tensor evicted_sin, Tensor? window_cos, Tensor? window_sin) -> ()",
    # Attention over all chunks at once; work outside the visible blocks is skipped. table: of a mask, as
    # `RangeMask.table` has it.
    "chunk_attention(Tensor q, Tensor k, Tensor v, int[] table, float scale) -> (Tensor out, Tensor lse)",
    "chunk_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] table, float scale) -> (Tensor, Tensor, Tensor)",
    # RMSNorm over the full width, head split and rotary: [B, T, H * D] -> [B, T, H, D].
    "qk_norm_rotary(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int "
    "num_heads, float eps) -> (Tensor, Tensor)",
    "qk_norm_rotary_into(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "int num_heads, float eps, Tensor(a!) k_out) -> Tensor",
    "qk_norm_rotary_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_weight, Tensor "
    "k_weight, Tensor cos, Tensor sin, int num_heads, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    # Adaptive layer norm per frame: x [B, T, D]; shift, scale, gate [B, F, D]; mean, rstd [B, T] float32.
    "modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor out, Tensor mean, "
    "Tensor rstd)",
    "modulated_norm_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> "
    "(Tensor, Tensor, Tensor)",
    "gated_add(Tensor x, Tensor y, Tensor gate) -> Tensor",
    "gated_add_backward(Tensor grad_out, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    # Linear layers that read the same x [B, T, K], side by side, and what follows: act(x W^T + bias) [B, T,
    # N], or residual + that * gate. gate [B, F, N], 1 where there is none. CPU alone, without a backward.
    "fused_linear(Tensor x, Tensor[] weights, Tensor[] biases, bool gelu, Tensor? residual, Tensor? "
    "gate) -> Tensor",
    # [before | silu(RMSNorm(x) * weight)]: what a causal convolution reads. x [B, T, D], weight [D], before
    # [B, P, D] -> [B, P + T, D].
    "rms_norm_silu(Tensor x, Tensor weight, Tensor? before, float eps) -> Tensor",
    # RMSNorm(x) * weight, the same without the activation. Without a backward.
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    # Pixel gradients [M, B, T, 3, H, W] -> [M, B, F, h, w] float32: channel norm, mean over a latent cell's
    # own pixels.
    "region_saliency(Tensor pixel_grads, int frames, int rows, int columns) -> Tensor",
    # Saliency [M, B, F, h, w] and scores [B, M] -> weights [B, F, 1, h, w] float32, mean 1 a sample.
    "intra_weights(Tensor saliency, Tensor scores, float temperature, float spatial_floor, float "
    "temporal_floor, float spatial_strength, float temporal_strength, bool use_spatial, bool "
    "use_temporal) -> Tensor",
    # The weighted DMD loss; all x0-predictions are [B, F, C, h, w]. Its gradient by x is factor [B] times
    # direction.
    "dmd_loss(Tensor x, Tensor fake, Tensor real_cond, Tensor? real_uncond, float guidance, Tensor? "
    "w_intra, Tensor? w_inter, Tensor? mask) -> (Tensor loss, Tensor direction, Tensor factor)",
    "dmd_loss_backward(Tensor grad_loss, Tensor direction, Tensor factor) -> Tensor",
    "dmd_gradient_(Tensor(a!) buffer, Tensor x, Tensor fake, Tensor real_cond, Tensor? real_uncond, "
    "float guidance, Tensor? w_intra, Tensor? w_inter, Tensor? mask, float scale) -> ()",
)

# Of ops with kernels for GPUs alone: a CPU's extension, which has none of them, fits any version of these.
GPU_SCHEMAS = (
    # x [B, T, K], or its GELU, in FP8: data [B, T, K] float8_e4m3fn, scale [B, T, 1] float32. The norm the
    # same. Without a backward.
    "quantize_rows(Tensor x, bool gelu) -> (Tensor data, Tensor scale)",
    "modulated_norm_fp8(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor data, Tensor row_scale)",
)
