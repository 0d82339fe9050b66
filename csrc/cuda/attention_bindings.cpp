// The attention ops on CUDA: checks, allocation and registration. The backward is matrix products of torch.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cuda/attention.h"
#include "cuda/tensors.h"

namespace stream_r1::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensor with rows of `width` elements, padded with zeros, that start at multiples of 16 bytes; itself if
// they do already.
Tensor with_tensor_core_rows(const Tensor& x, int64_t width) {
  if (x.size(3) != width) return at::constant_pad_nd(x, {0, width - x.size(3)}).contiguous();
  if (x.stride(3) != 1 && x.numel() != 0) return x.contiguous();
  return rows_are_aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

HeadStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Tensors that the arguments of a launch point into; kept alive until it is queued.
struct Prepared {
  Tensor q, k[2], v[2];
  AttentionArgs args{};
};

Prepared prepare(const char* op, const Tensor& q, double scale) {
  check_queries(op, q);
  TORCH_CHECK_TYPE(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, op,
                   ": q: expected bfloat16 or float16 on CUDA, got ", q.scalar_type());
  TORCH_CHECK_VALUE(q.size(3) <= 128, op, ": q: expected heads of at most 128 channels on CUDA, got ",
                    q.size(3));
  Prepared p;
  p.args.head_dim = q.size(3) <= 64 ? 64 : 128;
  p.q = with_tensor_core_rows(q, p.args.head_dim);
  p.args.q = p.q.const_data_ptr();
  p.args.q_strides = strides_of(p.q);
  p.args.batch = static_cast<int32_t>(q.size(0));
  p.args.queries = static_cast<int32_t>(q.size(1));
  p.args.heads = static_cast<int32_t>(q.size(2));
  p.args.scale = static_cast<float>(scale);
  p.args.is_bfloat16 = q.scalar_type() == at::kBFloat16;
  p.args.splits = 1;
  return p;
}

void set_keys(Prepared& p, int segment, const Tensor& k, const Tensor& v) {
  p.k[segment] = with_tensor_core_rows(k, p.args.head_dim);
  p.v[segment] = with_tensor_core_rows(v, p.args.head_dim);
  p.args.segments[segment] = {p.k[segment].const_data_ptr(), p.v[segment].const_data_ptr(),
                              strides_of(p.k[segment]), strides_of(p.v[segment]), k.size(1)};
}

std::tuple<Tensor, Tensor> run(const char* op, Prepared& p, int64_t head_dim) {
  const OnDevice device(p.q);
  const auto floats = p.q.options().dtype(at::kFloat);
  AttentionArgs& args = p.args;
  Tensor out = at::empty({args.batch, args.queries, args.heads, args.head_dim}, p.q.options());
  Tensor lse = at::empty({args.batch, args.heads, args.queries}, floats);
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  Device properties;
  check_launch(op, current_device(properties));
  args.splits = attention_splits(args, properties.processors);
  Tensor partial_out, partial_lse;
  if (args.splits > 1) {
    partial_out = at::empty({args.splits, args.batch, args.queries, args.heads, args.head_dim}, floats);
    partial_lse = at::empty({args.splits, args.batch, args.heads, args.queries}, floats);
    args.partial_out = partial_out.mutable_data_ptr<float>();
    args.partial_lse = partial_lse.mutable_data_ptr<float>();
  }
  check_launch(op, launch_attention(args, device.stream));
  return {head_dim == args.head_dim ? out : out.narrow(3, 0, head_dim).contiguous(), lse};
}

std::tuple<Tensor, Tensor> cached_chunk_attention(const Tensor& q, const OptionalTensor& k,
                                                  const OptionalTensor& v, const OptionalTensor& past_k,
                                                  const OptionalTensor& past_v, double scale) {
  const char* op = "cached_chunk_attention";
  check_segments(op, k, v, past_k, past_v);
  Prepared p = prepare(op, q, scale);
  if (past_k.has_value()) {
    check_keys(op, q, *past_k, *past_v);
    set_keys(p, 0, *past_k, *past_v);
  }
  if (k.has_value()) {
    check_keys(op, q, *k, *v);
    set_keys(p, 1, *k, *v);
  }
  return run(op, p, q.size(3));
}

std::tuple<Tensor, Tensor> chunk_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           int64_t tokens_per_frame, int64_t frames_per_chunk,
                                           std::optional<int64_t> window_frames, int64_t sink_frames,
                                           std::optional<int64_t> first_chunk_frames, bool teacher_forcing,
                                           double scale) {
  const char* op = "chunk_attention";
  Prepared p = prepare(op, q, scale);
  check_keys(op, q, k, v);
  check_shape(op, "k", k, "q", q);
  set_keys(p, 1, k, v);
  p.args.chunked = true;
  p.args.mask = checked_mask(tokens_per_frame, frames_per_chunk, window_frames, sink_frames,
                             first_chunk_frames, teacher_forcing);
  p.args.frames = checked_frames(p.args.mask, q);
  return run(op, p, q.size(3));
}

// Adds the gradients of one block of queries and one range of keys. All tensors are float32 [B * H, tokens,
// D]; grad_k and grad_v are undefined for keys without gradients. With p = exp(scale q k^T - lse) and ds = p
// (grad_out v^T - delta):  grad_q += scale ds k,  grad_k += scale ds^T q,  grad_v += p^T grad_out.
void add_gradients(const Tensor& q, const Tensor& grad_out, const Tensor& lse, const Tensor& delta,
                   double scale, const Tensor& k, const Tensor& v, Tensor grad_q, Tensor grad_k,
                   Tensor grad_v) {
  const Tensor p = at::bmm(q, k.transpose(1, 2)).mul_(scale).sub_(lse).exp_();
  const Tensor ds = at::bmm(grad_out, v.transpose(1, 2)).sub_(delta).mul_(p).mul_(scale);
  grad_q.baddbmm_(ds, k);
  if (!grad_k.defined()) return;
  grad_k.baddbmm_(ds.transpose(1, 2), q);
  grad_v.baddbmm_(p.transpose(1, 2), grad_out);
}

// [B, T, H, D] -> float32 [B * H, T, D] and back.
Tensor heads_first(const Tensor& x) { return x.to(at::kFloat).transpose(1, 2).flatten(0, 1); }

Tensor heads_last(const Tensor& x, const Tensor& like) {
  return x.unflatten(0, {like.size(0), like.size(2)}).transpose(1, 2).to(like.scalar_type()).contiguous();
}

constexpr int64_t kBackwardQueries = 512;  // at a time: bounds the memory of the scores

// `blocks`: what the queries see of the fresh keys; all of them see all of the past.
std::tuple<Tensor, Tensor, Tensor> backward(const std::vector<VisibleBlock>& blocks, const Tensor& grad_out_,
                                            const OptionalTensor& grad_lse, const Tensor& q_,
                                            const Tensor& k_, const Tensor& v_, const OptionalTensor& past_k_,
                                            const OptionalTensor& past_v_, const Tensor& out,
                                            const Tensor& lse_, double scale) {
  const Tensor q = heads_first(q_), k = heads_first(k_), v = heads_first(v_),
               grad_out = heads_first(grad_out_);
  const Tensor past_k = past_k_.has_value() ? heads_first(*past_k_) : Tensor(),
               past_v = past_v_.has_value() ? heads_first(*past_v_) : Tensor();
  const Tensor lse = lse_.flatten(0, 1).unsqueeze(2);                      // [B * H, T, 1]
  Tensor delta = grad_out.mul(heads_first(out)).sum(2, /*keepdim=*/true);  // [B * H, T, 1]
  if (grad_lse.has_value()) delta = delta - grad_lse->to(at::kFloat).flatten(0, 1).unsqueeze(2);
  Tensor grad_q = at::zeros_like(q), grad_k = at::zeros_like(k), grad_v = at::zeros_like(v);
  for (const VisibleBlock& block : blocks)
    for (int64_t begin = block.begin; begin < block.end; begin += kBackwardQueries) {
      const int64_t n = std::min(kBackwardQueries, block.end - begin);
      const auto part = [&](const Tensor& x) { return x.narrow(1, begin, n); };
      if (past_k.defined() && past_k.size(1) > 0)
        add_gradients(part(q), part(grad_out), part(lse), part(delta), scale, past_k, past_v, part(grad_q),
                      Tensor(), Tensor());
      for (int r = 0; r < block.num_ranges; ++r) {
        const TokenRange range = block.ranges[r];
        const auto keys = [&](const Tensor& x) { return x.narrow(1, range.begin, range.end - range.begin); };
        add_gradients(part(q), part(grad_out), part(lse), part(delta), scale, keys(k), keys(v), part(grad_q),
                      keys(grad_k), keys(grad_v));
      }
    }
  return {heads_last(grad_q, q_), heads_last(grad_k, k_), heads_last(grad_v, k_)};
}

std::tuple<Tensor, Tensor, Tensor> cached_chunk_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& past_k, const OptionalTensor& past_v, const Tensor& out, const Tensor& lse,
    double scale) {
  const std::vector<VisibleBlock> all{{0, q.size(1), {{0, k.size(1)}}, k.size(1) > 0 ? 1 : 0}};
  return backward(all, grad_out, grad_lse, q, k, v, past_k, past_v, out, lse, scale);
}

std::tuple<Tensor, Tensor, Tensor> chunk_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, int64_t tokens_per_frame, int64_t frames_per_chunk,
    std::optional<int64_t> window_frames, int64_t sink_frames, std::optional<int64_t> first_chunk_frames,
    bool teacher_forcing, double scale) {
  const ChunkMask mask = checked_mask(tokens_per_frame, frames_per_chunk, window_frames, sink_frames,
                                      first_chunk_frames, teacher_forcing);
  return backward(visible_blocks(mask, checked_frames(mask, q)), grad_out, std::nullopt, q, k, v,
                  std::nullopt, std::nullopt, out, lse, scale);
}

}  // namespace
}  // namespace stream_r1::cuda

TORCH_LIBRARY_IMPL(stream_r1, STREAM_R1_CUDA_KEY, m) {
  m.impl("cached_chunk_attention", stream_r1::cuda::cached_chunk_attention);
  m.impl("cached_chunk_attention_backward", stream_r1::cuda::cached_chunk_attention_backward);
  m.impl("chunk_attention", stream_r1::cuda::chunk_attention);
  m.impl("chunk_attention_backward", stream_r1::cuda::chunk_attention_backward);
}
