// What an op expects of its tensors, on any device. The public functions have checked before; these are for
// callers of torch.ops.stream_r1, and keep kernels from reading past an end.

#pragma once

#include <optional>

#include "common/tensors.h"

namespace stream_r1 {

inline void check_shape(const char* op, const char* name, const Tensor& value, const char* like,
                        const Tensor& expected) {
  STREAM_R1_CHECK(value.sizes() == expected.sizes(), op, ": ", name, ": expected shape ", expected.sizes(),
                  " as ", like, ", got ", value.sizes());
}

inline void check_dtype(const char* op, const char* name, const Tensor& value, const char* like,
                        const Tensor& expected) {
  STREAM_R1_CHECK(dtype_of(value) == dtype_of(expected), op, ": ", name, ": expected ", dtype_of(expected),
                  " as ", like, ", got ", dtype_of(value));
}

inline void check_sizes(const char* op, const char* name, const Tensor& value, Sizes expected) {
  STREAM_R1_CHECK(value.sizes() == expected, op, ": ", name, ": expected shape ", expected, ", got ",
                  value.sizes());
}

// Of a tensor that is written to: threads would race for an element that is there twice.
inline void check_apart(const char* op, const char* name, const Tensor& written) {
  const Sizes sizes = written.sizes(), strides = written.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    STREAM_R1_CHECK(strides[d] != 0 || sizes[d] <= 1 || written.numel() == 0, op, ": ", name,
                    ": expected elements of their own, got an expanded tensor of strides ", strides);
}

// Of a tensor that is written to, beside one that is read row by row or element by element: both may be the
// same memory where `in_place`, but not parts of each other. As torch has it, strides with gaps are let pass.
inline void check_not_over(const char* op, const char* name, const Tensor& written, const char* other_name,
                           const Tensor& other, bool in_place) {
  const Extent a(written), b(other);
  if (a.end <= b.begin || b.end <= a.begin) return;
  const bool same = a.begin == b.begin && a.end == b.end && written.strides() == other.strides();
  if (!same && !(lies_without_gaps(written) && lies_without_gaps(other))) return;
  STREAM_R1_CHECK(same && in_place, op, ": ", name, ": expected memory of its own, got some that ",
                  other_name, " lies in");
}

// The same beside a small tensor that is read again and again.
inline void check_not_among(const char* op, const char* name, const Tensor& written, const char* other_name,
                            const Tensor& other) {
  const Extent a(written), b(other);
  STREAM_R1_CHECK(a.end <= b.begin || b.end <= a.begin, op, ": ", name,
                  ": expected memory of its own, got some that ", other_name, " lies in");
}

// --- attention: q, k, v [B, T, H, D] ---

inline void check_queries(const char* op, const Tensor& q) {
  STREAM_R1_CHECK(q.dim() == 4, op, ": q: expected [B, T, H, D], got ", q.sizes());
}

inline void check_keys(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Sizes of_q = q.sizes(), of_k = k.sizes();
  for (const Tensor* x : {&k, &v}) {
    const Sizes sizes = x->sizes();
    STREAM_R1_CHECK(sizes.size() == 4 && sizes[0] == of_q[0] && sizes[1] == of_k[1] && sizes[2] == of_q[2] &&
                        sizes[3] == of_q[3],
                    op, ": keys and values: expected [", of_q[0], ", T, ", of_q[2], ", ", of_q[3],
                    "] of both, got ", of_k, " and ", v.sizes());
    check_dtype(op, "keys and values", *x, "q", q);
  }
}

// The keys are [past | fresh]; either may be absent, not both.
inline void check_segments(const char* op, const OptionalTensor& k, const OptionalTensor& v,
                           const OptionalTensor& past_k, const OptionalTensor& past_v) {
  STREAM_R1_CHECK(k.has_value() == v.has_value(), op, ": k, v: expected both or neither");
  STREAM_R1_CHECK(past_k.has_value() == past_v.has_value(), op, ": past: expected both k and v or neither");
  STREAM_R1_CHECK(k.has_value() || past_k.has_value(), op,
                  ": expected keys: fresh ones, a past, or both; got neither");
}

// --- row ops: x [B, T, D] ---

// A modulation per frame: [B, F, D], F dividing T.
inline void check_per_frame(const char* op, const char* name, const Tensor& value, const Tensor& x) {
  const Sizes of_x = x.sizes(), sizes = value.sizes();
  STREAM_R1_CHECK(of_x.size() == 3, op, ": x: expected shape [B, T, D], got ", of_x);
  STREAM_R1_CHECK(sizes.size() == 3 && sizes[0] == of_x[0] && sizes[2] == of_x[2] && sizes[1] > 0 &&
                      of_x[1] % sizes[1] == 0,
                  op, ": ", name, ": expected shape [B, F, D] with F dividing the tokens of x ", of_x,
                  ", got ", sizes);
}

inline void check_norm_modulation(const char* op, const Tensor& x, const Tensor& shift, const Tensor& scale) {
  check_per_frame(op, "shift", shift, x);
  check_per_frame(op, "scale", scale, x);
  STREAM_R1_CHECK(shift.size(1) == scale.size(1), op, ": scale: expected ", shift.size(1),
                  " frames as shift, got ", scale.size(1));
}

// x [B, T, D], weight [D], before [B, P, D] in x's dtype.
inline void check_rms_norm(const char* op, const Tensor& x, const Tensor& weight) {
  STREAM_R1_CHECK(x.dim() == 3, op, ": x: expected shape [B, T, D], got ", x.sizes());
  STREAM_R1_CHECK(weight.dim() == 1 && weight.size(0) == x.size(2), op, ": weight: expected shape [",
                  x.size(2), "], got ", weight.sizes());
}

inline void check_rms_norm_silu(const Tensor& x, const Tensor& weight, const OptionalTensor& before) {
  check_rms_norm("rms_norm_silu", x, weight);
  if (!before) return;
  STREAM_R1_CHECK(before->dim() == 3 && before->size(0) == x.size(0) && before->size(2) == x.size(2),
                  "rms_norm_silu: before: expected shape [", x.size(0), ", P, ", x.size(2), "], got ",
                  before->sizes());
  check_dtype("rms_norm_silu", "before", *before, "x", x);
}

// q, k [B, T, H * D], weights [H * D], cos, sin [T, D / 2].
inline void check_rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                         const Tensor& cos, const Tensor& sin, int64_t heads) {
  const char* op = "qk_norm_rotary";
  const Sizes sizes = q.sizes();
  STREAM_R1_CHECK(sizes.size() == 3 && sizes == k.sizes(), op,
                  ": q, k: expected the same [B, T, H * D], got ", sizes, " and ", k.sizes());
  check_dtype(op, "k", k, "q", q);
  const int64_t tokens = sizes[1], width = sizes[2];
  STREAM_R1_CHECK(heads > 0 && width % (2 * heads) == 0, op, ": num_heads: expected heads of even width in ",
                  width, " channels, got ", heads);
  for (const Tensor* weight : {&q_weight, &k_weight})
    STREAM_R1_CHECK(weight->numel() == width, op, ": weight: expected [", width, "], got ", weight->sizes());
  const int64_t pairs = width / heads / 2;
  for (const Tensor* phase : {&cos, &sin})
    STREAM_R1_CHECK(phase->sizes() == Sizes({tokens, pairs}), op, ": cos, sin: expected [", tokens, ", ",
                    pairs, "], got ", phase->sizes());
}

// Where the rotated keys of k [B, T, H * D] go: [B, T, H, D].
inline void check_key_slot(const Tensor& k_out, const Tensor& q, const Tensor& k, const Tensor& q_weight,
                           const Tensor& k_weight, const Tensor& cos, const Tensor& sin, int64_t heads) {
  const char* op = "qk_norm_rotary";
  const int64_t head_dim = k.size(2) / heads;
  STREAM_R1_CHECK(k_out.sizes() == Sizes({k.size(0), k.size(1), heads, head_dim}), op, ": k_out: expected [",
                  k.size(0), ", ", k.size(1), ", ", heads, ", ", head_dim, "], got ", k_out.sizes());
  check_dtype(op, "k_out", k_out, "k", k);
  STREAM_R1_CHECK(k_out.stride(3) == 1 || k_out.numel() == 0, op,
                  ": k_out: expected a contiguous last dimension, got strides ", k_out.strides());
  check_apart(op, "k_out", k_out);
  check_not_over(op, "k_out", k_out, "q", q, false);
  check_not_over(op, "k_out", k_out, "k", k, false);
  check_not_among(op, "k_out", k_out, "q_weight", q_weight);
  check_not_among(op, "k_out", k_out, "k_weight", k_weight);
  check_not_among(op, "k_out", k_out, "cos", cos);
  check_not_among(op, "k_out", k_out, "sin", sin);
}

// --- distillation: x0-predictions [B, F, C, h, w] ---

inline void check_predictions(const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                              const OptionalTensor& real_uncond, const OptionalTensor& w_inter) {
  STREAM_R1_CHECK(x.dim() == 5, "dmd: x: expected shape [B, F, C, h, w], got ", x.sizes());
  for (const Tensor& other : {fake, real_cond, real_uncond.value_or(real_cond)})
    check_shape("dmd", "fake, real_cond, real_uncond", other, "x", x);
  if (w_inter.has_value())
    STREAM_R1_CHECK(w_inter->dim() == 1 && w_inter->size(0) == x.size(0), "dmd: w_inter: expected shape [",
                    x.size(0), "], got ", w_inter->sizes());
}

// Of the gradient that is added to `buffer`.
inline void check_gradient_buffer(const Tensor& buffer, const Tensor& x, const Tensor& fake,
                                  const Tensor& real_cond, const OptionalTensor& real_uncond,
                                  const OptionalTensor& w_intra, const OptionalTensor& w_inter,
                                  const OptionalTensor& mask) {
  const char* op = "dmd_gradient_";
  check_shape(op, "buffer", buffer, "x", x);
  check_apart(op, "buffer", buffer);
  check_not_over(op, "buffer", buffer, "x", x, true);
  check_not_over(op, "buffer", buffer, "fake", fake, true);
  check_not_over(op, "buffer", buffer, "real_cond", real_cond, true);
  if (real_uncond) check_not_over(op, "buffer", buffer, "real_uncond", *real_uncond, true);
  if (w_intra) check_not_among(op, "buffer", buffer, "w_intra", *w_intra);
  if (w_inter) check_not_among(op, "buffer", buffer, "w_inter", *w_inter);
  if (mask) check_not_among(op, "buffer", buffer, "mask", *mask);
}

// A weight or mask is one value a plane where its last two dimensions are 1, else planes of h * w values.
inline Tensor whole_planes(const Tensor& value, const Tensor& x, bool* varies) {
  STREAM_R1_CHECK(value.dim() == 5, "dmd: w_intra, mask: expected 5 dimensions, got shape ", value.sizes());
  for (int64_t d = 0; d < 5; ++d)
    STREAM_R1_CHECK(value.size(d) == 1 || value.size(d) == x.size(d), "dmd: w_intra, mask: ", value.sizes(),
                    " does not broadcast to x ", x.sizes());
  *varies = value.size(3) != 1 || value.size(4) != 1;
  if (!*varies) return value;
  return with_dense_rows(expanded(value, {value.size(0), value.size(1), value.size(2), x.size(3), x.size(4)}),
                         2);
}

// pixel_grads [M, B, T, 3, H, W] for latent cells [F, h, w].
inline void check_pixel_grads(const Tensor& pixel_grads, int64_t frames, int64_t rows, int64_t columns) {
  const char* op = "region_saliency";
  STREAM_R1_CHECK(pixel_grads.dim() == 6, op, ": pixel_grads: expected shape [M, B, T, 3, H, W], got ",
                  pixel_grads.sizes());
  const int64_t pixel_frames = pixel_grads.size(2), height = pixel_grads.size(4), width = pixel_grads.size(5);
  const bool divides = frames > 0 && rows > 0 && columns > 0 && height % rows == 0 && width % columns == 0;
  const bool causal =
      frames == 1 ? pixel_frames == 1 : pixel_frames >= frames && (pixel_frames - 1) % (frames - 1) == 0;
  STREAM_R1_CHECK(divides && causal, op, ": latent_shape: (", frames, ", ", rows, ", ", columns,
                  ") does not fit pixel gradients of shape ", pixel_grads.sizes());
}

// saliency [M, B, F, h, w], scores [B, M].
inline void check_saliency(const Tensor& saliency, const Tensor& scores) {
  const char* op = "intra_weights";
  STREAM_R1_CHECK(saliency.dim() == 5, op, ": saliency: expected shape [M, B, F, h, w], got ",
                  saliency.sizes());
  const int64_t axes = saliency.size(0), batch = saliency.size(1);
  STREAM_R1_CHECK(axes > 0 && saliency.size(2) > 0 && saliency.size(3) * saliency.size(4) > 0, op,
                  ": saliency: expected sizes above 0, got ", saliency.sizes());
  STREAM_R1_CHECK(scores.sizes() == Sizes({batch, axes}), op, ": scores: expected shape [", batch, ", ", axes,
                  "], got ", scores.sizes());
}

}  // namespace stream_r1
