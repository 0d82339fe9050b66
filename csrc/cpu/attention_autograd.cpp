// Autograd of the attention ops, for any device: it only calls the registered forward and backward ops.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cpu/registered.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using CachedForward = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                 const OptionalTensor&, const OptionalTensor&, double);
using CachedBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&,
                                                          const Tensor&, const Tensor&, const OptionalTensor&,
                                                          const OptionalTensor&, const Tensor&, const Tensor&,
                                                          double);

std::tuple<Tensor, Tensor> cached_below_autograd(const Tensor& q, const OptionalTensor& k,
                                                 const OptionalTensor& v, const OptionalTensor& past_k,
                                                 const OptionalTensor& past_v, double scale) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = registered<CachedForward>("stream_r1::cached_chunk_attention");
  return op.call(q, k, v, past_k, past_v, scale);
}

// An absent past is saved as an undefined tensor.
Tensor or_undefined(const OptionalTensor& x) { return x.value_or(Tensor()); }
OptionalTensor if_defined(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

class CachedChunkAttention : public torch::autograd::Function<CachedChunkAttention> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& past_k, const OptionalTensor& past_v, double scale) {
    auto [out, lse] = cached_below_autograd(q, k, v, past_k, past_v, scale);
    context->save_for_backward({q, k, v, or_undefined(past_k), or_undefined(past_v), out, lse});
    context->saved_data["scale"] = scale;
    context->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = registered<CachedBackward>("stream_r1::cached_chunk_attention_backward");
    const variable_list saved = context->get_saved_variables();
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(saved[5]);
    auto [grad_q, grad_k, grad_v] =
        op.call(grad_out, if_defined(grads[1]), saved[0], saved[1], saved[2], if_defined(saved[3]),
                if_defined(saved[4]), saved[5], saved[6], context->saved_data["scale"].toDouble());
    return {grad_q, grad_k, grad_v, Tensor(), Tensor(), Tensor()};
  }
};

bool wants_grad(const OptionalTensor& x) { return x.has_value() && x->requires_grad(); }

std::tuple<Tensor, Tensor> cached_chunk_attention(const Tensor& q, const OptionalTensor& k,
                                                  const OptionalTensor& v, const OptionalTensor& past_k,
                                                  const OptionalTensor& past_v, double scale) {
  refuse_tangents({q, or_undefined(k), or_undefined(v), or_undefined(past_k), or_undefined(past_v)});
  const bool fresh_wants = q.requires_grad() || wants_grad(k) || wants_grad(v);
  const bool past_wants = wants_grad(past_k) || wants_grad(past_v);
  if (!at::GradMode::is_enabled() || !(fresh_wants || past_wants))
    return cached_below_autograd(q, k, v, past_k, past_v, scale);
  TORCH_CHECK_VALUE(!past_wants,
                    "cached_chunk_attention: past: expected tensors without requires_grad; the past gets no "
                    "gradient");
  TORCH_CHECK_VALUE(k.has_value() && v.has_value(),
                    "cached_chunk_attention: k, v: expected tensors where q requires grad, "
                    "got none");
  const variable_list out = CachedChunkAttention::apply(q, *k, *v, past_k, past_v, scale);
  return {out[0], out[1]};
}

using ChunkForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                                                std::optional<int64_t>, int64_t, std::optional<int64_t>, bool,
                                                double);
using ChunkBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                         const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                         int64_t, std::optional<int64_t>, int64_t,
                                                         std::optional<int64_t>, bool, double);

std::tuple<Tensor, Tensor> chunk_below_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                int64_t tokens_per_frame, int64_t frames_per_chunk,
                                                std::optional<int64_t> window_frames, int64_t sink_frames,
                                                std::optional<int64_t> first_chunk_frames,
                                                bool teacher_forcing, double scale) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = registered<ChunkForward>("stream_r1::chunk_attention");
  return op.call(q, k, v, tokens_per_frame, frames_per_chunk, window_frames, sink_frames, first_chunk_frames,
                 teacher_forcing, scale);
}

class ChunkAttention : public torch::autograd::Function<ChunkAttention> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                               int64_t tokens_per_frame, int64_t frames_per_chunk,
                               std::optional<int64_t> window_frames, int64_t sink_frames,
                               std::optional<int64_t> first_chunk_frames, bool teacher_forcing,
                               double scale) {
    auto [out, lse] = chunk_below_autograd(q, k, v, tokens_per_frame, frames_per_chunk, window_frames,
                                           sink_frames, first_chunk_frames, teacher_forcing, scale);
    context->save_for_backward({q, k, v, out, lse});
    context->mark_non_differentiable({lse});
    auto& saved = context->saved_data;
    saved["tokens_per_frame"] = tokens_per_frame;
    saved["frames_per_chunk"] = frames_per_chunk;
    saved["window_frames"] = window_frames;
    saved["sink_frames"] = sink_frames;
    saved["first_chunk_frames"] = first_chunk_frames;
    saved["teacher_forcing"] = teacher_forcing;
    saved["scale"] = scale;
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = registered<ChunkBackward>("stream_r1::chunk_attention_backward");
    const variable_list tensors = context->get_saved_variables();
    auto& saved = context->saved_data;
    auto [grad_q, grad_k, grad_v] =
        op.call(grads[0], tensors[0], tensors[1], tensors[2], tensors[3], tensors[4],
                saved["tokens_per_frame"].toInt(), saved["frames_per_chunk"].toInt(),
                saved["window_frames"].toOptional<int64_t>(), saved["sink_frames"].toInt(),
                saved["first_chunk_frames"].toOptional<int64_t>(), saved["teacher_forcing"].toBool(),
                saved["scale"].toDouble());
    variable_list result(10);
    result[0] = grad_q;
    result[1] = grad_k;
    result[2] = grad_v;
    return result;
  }
};

std::tuple<Tensor, Tensor> chunk_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           int64_t tokens_per_frame, int64_t frames_per_chunk,
                                           std::optional<int64_t> window_frames, int64_t sink_frames,
                                           std::optional<int64_t> first_chunk_frames, bool teacher_forcing,
                                           double scale) {
  if (!needs_graph({q, k, v}))
    return chunk_below_autograd(q, k, v, tokens_per_frame, frames_per_chunk, window_frames, sink_frames,
                                first_chunk_frames, teacher_forcing, scale);
  const variable_list out = ChunkAttention::apply(q, k, v, tokens_per_frame, frames_per_chunk, window_frames,
                                                  sink_frames, first_chunk_frames, teacher_forcing, scale);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) {
  m.impl("cached_chunk_attention", stream_r1::cached_chunk_attention);
  m.impl("chunk_attention", stream_r1::chunk_attention);
  m.impl("cached_chunk_attention_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("chunk_attention_backward", torch::autograd::autogradNotImplementedFallback());
}
