
#include "common/checks.h"
#include "cpu/gated_add_kernel.h"
#include "cpu/per_frame.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

Tensor gated_add_cpu(const Tensor& x_, const Tensor& y_, const Tensor& gate_) {
  check_per_frame("gated_add", "gate", gate_, x_);
  check_shape("gated_add", "y", y_, "x", x_);
  const Tensor x = with_dense_rows(x_), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  Tensor out = allocate({batch, tokens, width}, x);
  const GatedAddArgs args{source(x),      source(y),   x.stride(0),          x.stride(1),
                          y.stride(0),    y.stride(1), source(gate),         gate.stride(0),
                          gate.stride(1), target(out), goes_past_cache(out), tokens,
                          gate.size(1),   width};
  parallel_for(0, batch * tokens, grain(width),
               [&, kernel = pick_gated_add()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_add_backward_cpu(const Tensor& grad_out_, const Tensor& y_,
                                                  const Tensor& gate_) {
  check_per_frame("gated_add_backward", "gate", gate_, y_);
  check_shape("gated_add_backward", "grad_out", grad_out_, "y", y_);
  const Tensor grad_out = without_gaps(grad_out_), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  const int64_t batch = y.size(0), tokens = y.size(1), width = y.size(2), frames = gate.size(1);
  const FrameBlocks split(tokens / frames);
  Tensor grad_y = allocate({batch, tokens, width}, y);
  Tensor gate_sums = allocate({batch, frames, split.blocks, width}, kFloat, y);
  const GatedAddBackwardArgs args{source(grad_out),
                                  source(y),
                                  y.stride(0),
                                  y.stride(1),
                                  source(gate),
                                  gate.stride(0),
                                  gate.stride(1),
                                  target(grad_y),
                                  goes_past_cache(grad_y),
                                  gate_sums.mutable_data_ptr<float>(),
                                  tokens,
                                  frames,
                                  width,
                                  split.blocks,
                                  split.tokens_a_block};
  parallel_for(
      0, batch * frames * split.blocks, grain(width * split.tokens_a_block),
      [&, kernel = pick_gated_add_backward()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grad_y, sum_blocks(gate_sums, dtype_of(gate))};
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) {
  m.impl("gated_add", TORCH_BOX(&stream_r1::gated_add_cpu));
  m.impl("gated_add_backward", TORCH_BOX(&stream_r1::gated_add_backward_cpu));
}
