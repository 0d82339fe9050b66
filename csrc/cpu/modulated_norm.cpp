#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/modulated_norm_kernel.h"
#include "cpu/per_frame.h"
#include "cpu/registered.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> modulated_norm_cpu(const Tensor& x_, const Tensor& shift_,
                                                      const Tensor& scale_, double eps) {
  check_norm_modulation("modulated_norm", x_, shift_, scale_);
  const Tensor x = with_dense_rows(x_), shift = with_dense_rows(shift_), scale = with_dense_rows(scale_);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  Tensor out = at::empty({batch, tokens, width}, x.options());
  Tensor mean = at::empty({batch, tokens}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  const ModulatedNormArgs args{source(x),
                               x.stride(0),
                               x.stride(1),
                               source(shift),
                               source(scale),
                               shift.stride(0),
                               shift.stride(1),
                               scale.stride(0),
                               scale.stride(1),
                               target(out),
                               goes_past_cache(out),
                               mean.mutable_data_ptr<float>(),
                               rstd.mutable_data_ptr<float>(),
                               tokens,
                               shift.size(1),
                               width,
                               static_cast<float>(eps)};
  at::parallel_for(
      0, batch * tokens, grain(width),
      [&, kernel = pick_modulated_norm()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward_cpu(const Tensor& grad_out_, const Tensor& x_,
                                                               const Tensor& scale_, const Tensor& mean_,
                                                               const Tensor& rstd_) {
  check_per_frame("modulated_norm_backward", "scale", scale_, x_);
  check_shape("modulated_norm_backward", "grad_out", grad_out_, "x", x_);
  check_sizes("modulated_norm_backward", "mean", mean_, {x_.size(0), x_.size(1)});
  check_sizes("modulated_norm_backward", "rstd", rstd_, {x_.size(0), x_.size(1)});
  const Tensor grad_out = grad_out_.contiguous(), x = with_dense_rows(x_), scale = with_dense_rows(scale_);
  const Tensor mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), frames = scale.size(1);
  const FrameBlocks split(tokens / frames);
  Tensor grad_x = at::empty({batch, tokens, width}, x.options());
  Tensor shift_sums = at::empty({batch, frames, split.blocks, width}, x.options().dtype(at::kFloat));
  Tensor scale_sums = at::empty_like(shift_sums);
  const ModulatedNormBackwardArgs args{source(grad_out),
                                       source(x),
                                       x.stride(0),
                                       x.stride(1),
                                       source(scale),
                                       scale.stride(0),
                                       scale.stride(1),
                                       mean.const_data_ptr<float>(),
                                       rstd.const_data_ptr<float>(),
                                       target(grad_x),
                                       goes_past_cache(grad_x),
                                       shift_sums.mutable_data_ptr<float>(),
                                       scale_sums.mutable_data_ptr<float>(),
                                       tokens,
                                       frames,
                                       width,
                                       split.blocks,
                                       split.tokens_a_block};
  at::parallel_for(
      0, batch * frames * split.blocks, grain(width * split.tokens_a_block),
      [&, kernel = pick_modulated_norm_backward()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grad_x, sum_blocks(shift_sums, scale.scalar_type()), sum_blocks(scale_sums, scale.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> forward_below_autograd(const Tensor& x, const Tensor& shift,
                                                          const Tensor& scale, double eps) {
  static const auto op = registered<decltype(modulated_norm_cpu)>("stream_r1::modulated_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, shift, scale, eps);
}

struct ModulatedNorm : torch::autograd::Function<ModulatedNorm> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& x,
                                                const Tensor& shift, const Tensor& scale, double eps) {
    auto [out, mean, rstd] = forward_below_autograd(x, shift, scale, eps);
    context->save_for_backward({x, scale, mean, rstd});
    context->mark_non_differentiable({mean, rstd});
    return {out, mean, rstd};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op =
        registered<decltype(modulated_norm_backward_cpu)>("stream_r1::modulated_norm_backward");
    const auto saved = context->get_saved_variables();
    auto [grad_x, grad_shift, grad_scale] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3]);
    return {grad_x, grad_shift, grad_scale, Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> modulated_norm_autograd(const Tensor& x, const Tensor& shift,
                                                           const Tensor& scale, double eps) {
  if (!needs_graph({x, shift, scale})) return forward_below_autograd(x, shift, scale, eps);
  const auto results = ModulatedNorm::apply(x, shift, scale, eps);
  return {results[0], results[1], results[2]};
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, CPU, m) {
  m.impl("modulated_norm", stream_r1::modulated_norm_cpu);
  m.impl("modulated_norm_backward", stream_r1::modulated_norm_backward_cpu);
}

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) {
  m.impl("modulated_norm", stream_r1::modulated_norm_autograd);
  m.impl("modulated_norm_backward", torch::autograd::autogradNotImplementedFallback());
}
