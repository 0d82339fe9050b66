// renew_sink_ on CUDA: checks and registration.

#include "cuda/sink.h"
#include "cuda/tensors.h"

namespace stream_r1::cuda {
namespace {

const float* phases(const OptionalTensor& phase, int64_t head_dim) {
  if (!phase.has_value()) return nullptr;
  STREAM_R1_CHECK(phase->sizes() == Sizes({head_dim / 2}) && phase->is_contiguous(),
                  "renew_sink_: phases: expected [", head_dim / 2, "], got ", phase->sizes());
  return phase->const_data_ptr<float>();
}

void renew_sink_(Tensor storage, Tensor sink_k, OptionalTensor sink_v, int64_t slot,
                 std::optional<double> ema, bool first, const Tensor& evicted_cos, const Tensor& evicted_sin,
                 const OptionalTensor& window_cos, const OptionalTensor& window_sin) {
  const char* op = "renew_sink_";
  STREAM_R1_CHECK(storage.dim() == 6 && storage.size(1) == 2 && storage.is_contiguous(), op,
                  ": storage: expected contiguous [L, 2, B, T, H, D], got ", storage.sizes());
  const int64_t layers = storage.size(0), batch = storage.size(2), tokens = storage.size(3),
                heads = storage.size(4), head_dim = storage.size(5);
  for (const Tensor& sink : {sink_k, sink_v.value_or(sink_k)}) {
    STREAM_R1_CHECK(sink.dim() == 5 && sink.is_contiguous() && sink.sizes() == sink_k.sizes() &&
                        sink.size(0) == layers && sink.size(1) == batch && sink.size(3) == heads &&
                        sink.size(4) == head_dim,
                    op, ": sink_k, sink_v: expected contiguous [", layers, ", ", batch, ", S, ", heads, ", ",
                    head_dim, "], got ", sink.sizes());
    STREAM_R1_CHECK(dtype_of(sink) == dtype_of(storage) || dtype_of(sink) == kFloat, op,
                    ": sink_k, sink_v: expected ", dtype_of(storage), " as storage, or float32, got ",
                    dtype_of(sink));
    STREAM_R1_CHECK(dtype_of(sink) == dtype_of(sink_k), op, ": sink_v: expected ", dtype_of(sink_k),
                    " as sink_k, got ", dtype_of(sink));
  }
  const int64_t sink_tokens = sink_k.size(2);
  STREAM_R1_CHECK(
      sink_tokens <= tokens && (!ema.has_value() || (slot >= sink_tokens && slot + sink_tokens <= tokens)),
      op, ": slot: expected a slot of ", sink_tokens, " tokens past the sink and within ", tokens, ", got ",
      slot);
  STREAM_R1_CHECK(window_cos.has_value() == window_sin.has_value(), op,
                  ": window_cos, window_sin: expected both or neither");
  const OnDevice device(storage);
  RenewSinkArgs args{};
  args.storage = storage.mutable_data_ptr();
  args.sink_k = sink_k.mutable_data_ptr();
  args.sink_v = sink_v.has_value() ? sink_v->mutable_data_ptr() : nullptr;
  args.evicted_cos = phases(evicted_cos, head_dim);
  args.evicted_sin = phases(evicted_sin, head_dim);
  args.window_cos = phases(window_cos, head_dim);
  args.window_sin = phases(window_sin, head_dim);
  args.layers = layers, args.batch = batch, args.tokens = tokens, args.heads = heads;
  args.sink_tokens = sink_tokens, args.slot = slot;
  args.head_dim = static_cast<int32_t>(head_dim);
  args.averages = ema.has_value();
  args.keep = static_cast<float>(ema.value_or(1));
  args.add = static_cast<float>(1 - ema.value_or(1));
  args.first = first;
  args.element = element_of(storage);
  args.sink_element = element_of(sink_k);
  check_launch(op, launch_renew_sink(args, device.stream));
}

}  // namespace
}  // namespace stream_r1::cuda

STREAM_R1_REGISTER(STREAM_R1_CUDA_KEY, m) { m.impl("renew_sink_", TORCH_BOX(&stream_r1::cuda::renew_sink_)); }
