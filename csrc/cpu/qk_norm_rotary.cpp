// qk_norm_rotary: checks, allocation, autograd and registration. The loops are in qk_norm_rotary_kernel.cpp.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cpu/qk_norm_rotary_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t heads) {
  TORCH_CHECK_VALUE(q.dim() == 3 && q.sizes() == k.sizes(),
                    "qk_norm_rotary: q, k: expected the same [B, T, H * D], got ", q.sizes(), " and ",
                    k.sizes());
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type(), "qk_norm_rotary: k: expected ", q.scalar_type(),
                   " as q, got ", k.scalar_type());
  TORCH_CHECK_VALUE(heads > 0 && q.size(2) % (2 * heads) == 0,
                    "qk_norm_rotary: num_heads: expected heads of even width in ", q.size(2),
                    " channels, got ", heads);
  const int64_t pairs = q.size(2) / heads / 2;
  for (const Tensor& phase : {cos, sin})
    TORCH_CHECK_VALUE(phase.dim() == 2 && phase.size(0) == q.size(1) && phase.size(1) == pairs,
                      "qk_norm_rotary: cos, sin: expected [", q.size(1), ", ", pairs, "], got ",
                      phase.sizes());
}

Tensor contiguous_float(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

NormRotaryArgs arguments(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin,
                         int64_t heads, double eps, const Tensor& y) {
  TORCH_CHECK_VALUE(weight.numel() == x.size(2), "qk_norm_rotary: weight: expected [", x.size(2), "], got ",
                    weight.sizes());
  NormRotaryArgs args{};
  args.tokens = x.size(1);
  args.heads = heads;
  args.head_dim = x.size(2) / heads;
  args.eps = static_cast<float>(eps);
  args.x = source(x);
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  args.weight = weight.const_data_ptr<float>();
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  args.y_batch = y.stride(0);
  args.y_token = y.stride(1);
  args.y_head = y.stride(2);
  return args;
}

// Writes norm + rotary of x into out [B, T, H, D].
void run(const Tensor& x_any, const Tensor& weight_any, const Tensor& cos, const Tensor& sin, int64_t heads,
         double eps, const Tensor& out) {
  const Tensor x = with_dense_rows(x_any), weight = contiguous_float(weight_any);
  NormRotaryArgs args = arguments(x, weight, cos, sin, heads, eps, out);
  args.out = target(out);
  auto* kernel = pick_norm_rotary();
  at::parallel_for(0, x.size(0) * x.size(1), grain(x.size(2)),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor empty_heads(const Tensor& x, int64_t heads) {
  return at::empty({x.size(0), x.size(1), heads, x.size(2) / heads}, x.options());
}

std::tuple<Tensor, Tensor> qk_norm_rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                          const Tensor& k_weight, const Tensor& cos_any,
                                          const Tensor& sin_any, int64_t heads, double eps) {
  check(q, k, cos_any, sin_any, heads);
  const Tensor cos = contiguous_float(cos_any), sin = contiguous_float(sin_any);
  Tensor q_out = empty_heads(q, heads), k_out = empty_heads(k, heads);
  run(q, q_weight, cos, sin, heads, eps, q_out);
  run(k, k_weight, cos, sin, heads, eps, k_out);
  return {q_out, k_out};
}

Tensor qk_norm_rotary_into(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                           const Tensor& cos_any, const Tensor& sin_any, int64_t heads, double eps,
                           Tensor& k_out) {
  check(q, k, cos_any, sin_any, heads);
  const int64_t head_dim = q.size(2) / heads;
  TORCH_CHECK_VALUE(k_out.sizes() == at::IntArrayRef({k.size(0), k.size(1), heads, head_dim}),
                    "qk_norm_rotary: k_out: expected [", k.size(0), ", ", k.size(1), ", ", heads, ", ",
                    head_dim, "], got ", k_out.sizes());
  TORCH_CHECK_TYPE(k_out.scalar_type() == k.scalar_type(), "qk_norm_rotary: k_out: expected ",
                   k.scalar_type(), " as k, got ", k_out.scalar_type());
  TORCH_CHECK_VALUE(k_out.stride(3) == 1 || k_out.numel() == 0,
                    "qk_norm_rotary: k_out: expected a contiguous last dimension, got strides ",
                    k_out.strides());
  const Tensor cos = contiguous_float(cos_any), sin = contiguous_float(sin_any);
  Tensor q_out = empty_heads(q, heads);
  run(q, q_weight, cos, sin, heads, eps, q_out);
  run(k, k_weight, cos, sin, heads, eps, k_out);
  return q_out;
}

// -> grad_x, grad_weight. Parts of the weight's gradient are summed in a fixed order, for any number of
// threads the same.
std::tuple<Tensor, Tensor> run_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any,
                                        const Tensor& cos, const Tensor& sin, int64_t heads, double eps) {
  const Tensor x = with_dense_rows(x_any), weight = contiguous_float(weight_any),
               grad = with_dense_rows(grad_any);
  const int64_t rows = x.size(0) * x.size(1), width = x.size(2);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  NormRotaryArgs args = arguments(x, weight, cos, sin, heads, eps, grad);
  args.grad_out = source(grad);
  args.out = target(grad_x);
  const int64_t part_rows = std::max<int64_t>(64, (rows + 63) / 64),
                parts = (rows + part_rows - 1) / part_rows;
  Tensor grad_weight = at::zeros({parts, width}, x.options().dtype(at::kFloat));
  auto* kernel = pick_norm_rotary_backward();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      kernel(args, part * part_rows, std::min(rows, (part + 1) * part_rows),
             grad_weight.mutable_data_ptr<float>() + part * width);
  });
  return {grad_x, grad_weight.sum(0).to(weight_any.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rotary_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, const Tensor& q_weight,
    const Tensor& k_weight, const Tensor& cos_any, const Tensor& sin_any, int64_t heads, double eps) {
  check(q, k, cos_any, sin_any, heads);
  const Tensor cos = contiguous_float(cos_any), sin = contiguous_float(sin_any);
  auto [q_grad, q_weight_grad] = run_backward(grad_q, q, q_weight, cos, sin, heads, eps);
  auto [k_grad, k_weight_grad] = run_backward(grad_k, k, k_weight, cos, sin, heads, eps);
  return {q_grad, k_grad, q_weight_grad, k_weight_grad};
}

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

class QkNormRotary : public torch::autograd::Function<QkNormRotary> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k,
                               const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos,
                               const Tensor& sin, int64_t heads, double eps) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto forward_op = op<decltype(qk_norm_rotary)>("stream_r1::qk_norm_rotary");
    auto [q_out, k_out] = forward_op.call(q, k, q_weight, k_weight, cos, sin, heads, eps);
    context->save_for_backward({q, k, q_weight, k_weight, cos, sin});
    context->saved_data["heads"] = heads;
    context->saved_data["eps"] = eps;
    return {q_out, k_out};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto backward_op =
        op<decltype(qk_norm_rotary_backward)>("stream_r1::qk_norm_rotary_backward");
    const variable_list saved = context->get_saved_variables();
    const int64_t heads = context->saved_data["heads"].toInt();
    auto [q, k, q_weight, k_weight] =
        backward_op.call(grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                         heads, context->saved_data["eps"].toDouble());
    return {q, k, q_weight, k_weight, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> qk_norm_rotary_autograd(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                                   const Tensor& k_weight, const Tensor& cos,
                                                   const Tensor& sin, int64_t heads, double eps) {
  const variable_list out = QkNormRotary::apply(q, k, q_weight, k_weight, cos, sin, heads, eps);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, CPU, m) {
  m.impl("qk_norm_rotary", stream_r1::qk_norm_rotary);
  m.impl("qk_norm_rotary_into", stream_r1::qk_norm_rotary_into);
  m.impl("qk_norm_rotary_backward", stream_r1::qk_norm_rotary_backward);
}

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) { m.impl("qk_norm_rotary", stream_r1::qk_norm_rotary_autograd); }
