#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/gated_add_kernel.h"
#include "cpu/per_frame.h"
#include "cpu/registered.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;

Tensor gated_add_cpu(const Tensor& x_, const Tensor& y_, const Tensor& gate_) {
  check_per_frame("gated_add", "gate", gate_, x_);
  check_shape("gated_add", "y", y_, "x", x_);
  const Tensor x = with_dense_rows(x_), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  Tensor out = at::empty({batch, tokens, width}, x.options());
  const GatedAddArgs args{source(x),      source(y),   x.stride(0),          x.stride(1),
                          y.stride(0),    y.stride(1), source(gate),         gate.stride(0),
                          gate.stride(1), target(out), goes_past_cache(out), tokens,
                          gate.size(1),   width};
  at::parallel_for(0, batch * tokens, grain(width),
                   [&, kernel = pick_gated_add()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_add_backward_cpu(const Tensor& grad_out_, const Tensor& y_,
                                                  const Tensor& gate_) {
  check_per_frame("gated_add_backward", "gate", gate_, y_);
  check_shape("gated_add_backward", "grad_out", grad_out_, "y", y_);
  const Tensor grad_out = grad_out_.contiguous(), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  const int64_t batch = y.size(0), tokens = y.size(1), width = y.size(2), frames = gate.size(1);
  const FrameBlocks split(tokens / frames);
  Tensor grad_y = at::empty({batch, tokens, width}, y.options());
  Tensor gate_sums = at::empty({batch, frames, split.blocks, width}, y.options().dtype(at::kFloat));
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
  at::parallel_for(
      0, batch * frames * split.blocks, grain(width * split.tokens_a_block),
      [&, kernel = pick_gated_add_backward()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grad_y, sum_blocks(gate_sums, gate.scalar_type())};
}

Tensor forward_below_autograd(const Tensor& x, const Tensor& y, const Tensor& gate) {
  static const auto op = registered<decltype(gated_add_cpu)>("stream_r1::gated_add");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, y, gate);
}

struct GatedAdd : torch::autograd::Function<GatedAdd> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& y,
                        const Tensor& gate) {
    context->save_for_backward({y, gate});
    return forward_below_autograd(x, y, gate);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = registered<decltype(gated_add_backward_cpu)>("stream_r1::gated_add_backward");
    const auto saved = context->get_saved_variables();
    auto [grad_y, grad_gate] = op.call(grads[0], saved[0], saved[1]);
    return {grads[0], grad_y, grad_gate};
  }
};

Tensor gated_add_autograd(const Tensor& x, const Tensor& y, const Tensor& gate) {
  return needs_graph({x, y, gate}) ? GatedAdd::apply(x, y, gate) : forward_below_autograd(x, y, gate);
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, CPU, m) {
  m.impl("gated_add", stream_r1::gated_add_cpu);
  m.impl("gated_add_backward", stream_r1::gated_add_backward_cpu);
}

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) {
  m.impl("gated_add", stream_r1::gated_add_autograd);
  m.impl("gated_add_backward", torch::autograd::autogradNotImplementedFallback());
}
