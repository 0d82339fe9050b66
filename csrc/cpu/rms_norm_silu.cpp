#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/registered.h"
#include "cpu/rms_norm_silu_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;

Tensor norm(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& before_, double eps,
            bool silu) {
  const int64_t batch = x_.size(0), tokens = x_.size(1), width = x_.size(2);
  const Tensor x = with_dense_rows(x_), weight = contiguous_float(weight_);
  const Tensor before = before_ ? with_dense_rows(*before_) : x.narrow(1, 0, 0);
  Tensor out = at::empty({batch, before.size(1) + tokens, width}, x.options());
  const RmsNormSiluArgs args{source(x),
                             x.stride(0),
                             x.stride(1),
                             weight.const_data_ptr<float>(),
                             source(before),
                             before.stride(0),
                             before.stride(1),
                             target(out),
                             goes_past_cache(out),
                             before.size(1),
                             tokens,
                             width,
                             static_cast<float>(eps),
                             silu};
  at::parallel_for(
      0, batch * out.size(1), grain(width),
      [&, kernel = pick_rms_norm_silu()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor rms_norm_silu_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& before,
                         double eps) {
  check_rms_norm_silu(x, weight, before);
  return norm(x, weight, before, eps, true);
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm("rms_norm", x, weight);
  return norm(x, weight, std::nullopt, eps, false);
}

Tensor forward_below_autograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& before,
                              double eps) {
  static const auto op = registered<decltype(rms_norm_silu_cpu)>("stream_r1::rms_norm_silu");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, before, eps);
}

// The backward is made of torch's ops, in float32: autoencoders stream without gradients.
struct RmsNormSilu : torch::autograd::Function<RmsNormSilu> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& before, double eps) {
    context->save_for_backward({x, weight});
    context->saved_data["eps"] = eps;
    context->saved_data["joined"] = before.has_value();
    context->saved_data["leading"] = before ? before->size(1) : 0;
    return forward_below_autograd(x, weight, before, eps);
  }

  // With n = x * rstd, y = n * weight and g the gradient by y: grad_x = rstd * (u - n * mean(u * n)),
  // u = g * weight.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const c10::SymInt leading = context->saved_data["leading"].toInt();
    const Tensor wide = x.to(at::kFloat), factor = weight.to(at::kFloat);
    const Tensor rstd = (wide.square().mean(-1, true) + context->saved_data["eps"].toDouble()).rsqrt();
    const Tensor n = wide * rstd, y = n * factor, s = y.sigmoid();
    const Tensor grad = grads[0].narrow_symint(1, leading, x.sym_size(1)).to(at::kFloat);
    const Tensor g = grad * (s * (1 + y * (1 - s))), u = g * factor;
    Tensor grad_x, grad_weight, grad_before;
    if (context->needs_input_grad(0)) grad_x = (rstd * (u - n * (u * n).mean(-1, true))).to(x.scalar_type());
    if (context->needs_input_grad(1)) grad_weight = (g * n).sum({0, 1}).to(weight.scalar_type());
    // without `before` there is no third edge to ask about
    if (context->saved_data["joined"].toBool() && context->needs_input_grad(2))
      grad_before = grads[0].narrow_symint(1, 0, leading);
    return {grad_x, grad_weight, grad_before, Tensor()};
  }
};

Tensor rms_norm_silu_autograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& before,
                              double eps) {
  if (!needs_graph({x, weight, before.value_or(Tensor())}))
    return forward_below_autograd(x, weight, before, eps);
  return RmsNormSilu::apply(x, weight, before, eps);
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, CPU, m) {
  m.impl("rms_norm_silu", stream_r1::rms_norm_silu_cpu);
  m.impl("rms_norm", stream_r1::rms_norm_cpu);
}

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) {
  m.impl("rms_norm_silu", stream_r1::rms_norm_silu_autograd);
  m.impl("rms_norm", torch::autograd::autogradNotImplementedFallback());
}
