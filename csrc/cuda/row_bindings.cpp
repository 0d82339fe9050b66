// qk_norm_rotary, modulated_norm, gated_add and rms_norm_silu on CUDA: checks, allocation and registration.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cuda/column_sums.h"
#include "cuda/gated_add.h"
#include "cuda/modulated_norm.h"
#include "cuda/qk_norm_rotary.h"
#include "cuda/rms_norm_silu.h"
#include "cuda/tensors.h"

namespace stream_r1::cuda {
namespace {

using at::Tensor;

// sums [units, parts, D] -> [units, D] in the type of `like`.
Tensor add_parts(const char* op, const Tensor& sums, at::IntArrayRef shape, const Tensor& like,
                 Stream stream) {
  Tensor out = at::empty(shape, like.options());
  const int64_t width = sums.size(-1), parts = sums.size(-2);
  const int64_t units = parts * width == 0 ? 0 : sums.numel() / (parts * width);
  check_launch(op,
               launch_add_parts({sums.const_data_ptr<float>(), target(out), units, parts, width}, stream));
  return out;
}

// Kernels read weights in float32, bfloat16 and float16.
Tensor read_by_kernels(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? weight.to(at::kFloat) : weight.contiguous();
}

// --- qk_norm_rotary ---

// The arguments of a launch, and what they point into.
struct Rotary {
  Tensor x[2], weight[2], cos, sin;
  NormRotaryArgs args{};

  Rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos_,
         const Tensor& sin_, int64_t heads, double eps)
      : x{with_dense_rows(q), with_dense_rows(k)},
        weight{read_by_kernels(q_weight), read_by_kernels(k_weight)},
        cos(cos_.to(at::kFloat).contiguous()),
        sin(sin_.to(at::kFloat).contiguous()) {
    check_rotary(q, k, q_weight, k_weight, cos, sin, heads);
    args.cos = cos.const_data_ptr<float>();
    args.sin = sin.const_data_ptr<float>();
    args.batch = q.size(0);
    args.tokens = q.size(1);
    args.heads = static_cast<int32_t>(heads);
    args.head_dim = static_cast<int32_t>(q.size(2) / heads);
    args.eps = static_cast<float>(eps);
    args.element = element_of(q);
    for (int i = 0; i < 2; ++i) {
      NormRotarySide& side = args.sides[i];
      side.x = x[i].const_data_ptr();
      side.x_batch = x[i].stride(0);
      side.x_token = x[i].stride(1);
      side.weight = source(weight[i]);
    }
  }

  void set_heads(int i, const Tensor& y) {
    args.sides[i].y = y.data_ptr();
    args.sides[i].y_batch = y.stride(0);
    args.sides[i].y_token = y.stride(1);
    args.sides[i].y_head = y.stride(2);
  }
};

std::tuple<Tensor, Tensor> qk_norm_rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                          const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                                          int64_t heads, double eps) {
  const OnDevice device(q);
  Rotary rotary(q, k, q_weight, k_weight, cos, sin, heads, eps);
  Tensor q_out = empty_heads(q, heads), k_out = empty_heads(k, heads);
  rotary.set_heads(0, q_out);
  rotary.set_heads(1, k_out);
  check_launch("qk_norm_rotary", launch_norm_rotary(rotary.args, device.stream));
  return {q_out, k_out};
}

Tensor qk_norm_rotary_into(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                           const Tensor& cos, const Tensor& sin, int64_t heads, double eps, Tensor& k_out) {
  const OnDevice device(q);
  Rotary rotary(q, k, q_weight, k_weight, cos, sin, heads, eps);
  check_key_slot(k_out, q, k, q_weight, k_weight, cos, sin, heads);
  Tensor q_out = empty_heads(q, heads);
  rotary.set_heads(0, q_out);
  rotary.set_heads(1, k_out);
  check_launch("qk_norm_rotary", launch_norm_rotary(rotary.args, device.stream));
  return q_out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rotary_backward(
    const Tensor& grad_q_, const Tensor& grad_k_, const Tensor& q, const Tensor& k, const Tensor& q_weight,
    const Tensor& k_weight, const Tensor& cos, const Tensor& sin, int64_t heads, double eps) {
  const OnDevice device(q);
  Rotary rotary(q, k, q_weight, k_weight, cos, sin, heads, eps);
  for (const Tensor& grad : {grad_q_, grad_k_})
    check_sizes("qk_norm_rotary_backward", "grad_q, grad_k", grad,
                {q.size(0), q.size(1), heads, q.size(2) / heads});
  NormRotaryArgs& args = rotary.args;
  const Tensor upstream[2] = {with_dense_rows(grad_q_.to(q.scalar_type())),
                              with_dense_rows(grad_k_.to(k.scalar_type()))};
  const int64_t rows = q.size(0) * q.size(1), width = q.size(2);
  const Parts split(rows);
  args.parts = split.parts;
  args.rows_a_part = split.rows_a_part;
  Tensor grads[2] = {at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options())};
  Tensor inverse_rms = at::empty({2, rows}, q.options().dtype(at::kFloat));
  Tensor sums = at::empty({2, split.parts, width}, inverse_rms.options());
  for (int i = 0; i < 2; ++i) {
    rotary.set_heads(i, upstream[i]);
    args.sides[i].grad_x = grads[i].mutable_data_ptr();
    args.sides[i].inverse_rms = inverse_rms.mutable_data_ptr<float>() + i * rows;
    args.sides[i].weight_sums = sums.mutable_data_ptr<float>() + i * split.parts * width;
  }
  check_launch("qk_norm_rotary", launch_norm_rotary_backward(args, device.stream));
  return {grads[0], grads[1],
          add_parts("qk_norm_rotary", sums.select(0, 0), q_weight.sizes(), q_weight, device.stream),
          add_parts("qk_norm_rotary", sums.select(0, 1), k_weight.sizes(), k_weight, device.stream)};
}

// --- modulated_norm ---

ModulatedNormArgs norm_arguments(const Tensor& x, const Tensor& scale, const Tensor& mean,
                                 const Tensor& rstd) {
  ModulatedNormArgs args{};
  args.x = x.const_data_ptr();
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  args.scale = source(scale);
  args.scale_batch = scale.stride(0);
  args.scale_frame = scale.stride(1);
  args.mean = const_cast<float*>(mean.const_data_ptr<float>());
  args.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.frames = scale.size(1);
  args.width = static_cast<int32_t>(x.size(2));
  args.element = element_of(x);
  return args;
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm(const Tensor& x_, const Tensor& shift_,
                                                  const Tensor& scale_, double eps) {
  const char* op = "modulated_norm";
  check_norm_modulation(op, x_, shift_, scale_);
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_), shift = with_dense_rows(shift_), scale = with_dense_rows(scale_);
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor mean = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  ModulatedNormArgs args = norm_arguments(x, scale, mean, rstd);
  args.shift = source(shift);
  args.shift_batch = shift.stride(0);
  args.shift_frame = shift.stride(1);
  args.out = out.mutable_data_ptr();
  args.eps = static_cast<float>(eps);
  check_launch(op, launch_modulated_norm(args, device.stream));
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward(const Tensor& grad_out_, const Tensor& x_,
                                                           const Tensor& scale_, const Tensor& mean_,
                                                           const Tensor& rstd_) {
  const char* op = "modulated_norm_backward";
  check_per_frame(op, "scale", scale_, x_);
  check_shape(op, "grad_out", grad_out_, "x", x_);
  check_sizes(op, "mean", mean_, {x_.size(0), x_.size(1)});
  check_sizes(op, "rstd", rstd_, {x_.size(0), x_.size(1)});
  const OnDevice device(x_);
  const Tensor grad_out = grad_out_.to(x_.scalar_type()).contiguous(), x = with_dense_rows(x_),
               scale = with_dense_rows(scale_), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  ModulatedNormArgs args = norm_arguments(x, scale, mean, rstd);
  const Parts split(args.tokens / args.frames);
  args.parts = split.parts;
  args.rows_a_part = split.rows_a_part;
  args.grad_out = grad_out.const_data_ptr();
  Tensor grad_x = at::empty(x.sizes(), x.options());
  args.grad_x = grad_x.mutable_data_ptr();
  Tensor shift_sums =
      at::empty({args.batch, args.frames, split.parts, args.width}, x.options().dtype(at::kFloat));
  Tensor scale_sums = at::empty_like(shift_sums);
  args.shift_sums = shift_sums.mutable_data_ptr<float>();
  args.scale_sums = scale_sums.mutable_data_ptr<float>();
  check_launch(op, launch_modulated_norm_backward(args, device.stream));
  return {grad_x, add_parts(op, shift_sums, scale.sizes(), scale, device.stream),
          add_parts(op, scale_sums, scale.sizes(), scale, device.stream)};
}

// --- gated_add ---

GatedAddArgs gate_arguments(const Tensor& x, const Tensor& y, const Tensor& gate) {
  TORCH_CHECK_TYPE(x.scalar_type() == y.scalar_type() || x.scalar_type() == at::kFloat,
                   "gated_add: y: expected ", x.scalar_type(), " as x, or a float32 x, got ",
                   y.scalar_type());
  GatedAddArgs args{};
  args.y = y.const_data_ptr();
  args.y_batch = y.stride(0);
  args.y_token = y.stride(1);
  args.gate = source(gate);
  args.gate_batch = gate.stride(0);
  args.gate_frame = gate.stride(1);
  args.batch = y.size(0);
  args.tokens = y.size(1);
  args.frames = gate.size(1);
  args.width = static_cast<int32_t>(y.size(2));
  args.x_element = element_of(x);
  args.y_element = element_of(y);
  return args;
}

Tensor gated_add(const Tensor& x_, const Tensor& y_, const Tensor& gate_) {
  check_per_frame("gated_add", "gate", gate_, x_);
  check_shape("gated_add", "y", y_, "x", x_);
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  GatedAddArgs args = gate_arguments(x, y, gate);
  args.x = x.const_data_ptr();
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  Tensor out = at::empty(x.sizes(), x.options());
  args.out = out.mutable_data_ptr();
  check_launch("gated_add", launch_gated_add(args, device.stream));
  return out;
}

std::tuple<Tensor, Tensor> gated_add_backward(const Tensor& grad_out_, const Tensor& y_,
                                              const Tensor& gate_) {
  const char* op = "gated_add_backward";
  check_per_frame(op, "gate", gate_, y_);
  check_shape(op, "grad_out", grad_out_, "y", y_);
  const OnDevice device(y_);
  const Tensor grad_out = grad_out_.contiguous(), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  GatedAddArgs args = gate_arguments(grad_out, y, gate);
  const Parts split(args.tokens / args.frames);
  args.parts = split.parts;
  args.rows_a_part = split.rows_a_part;
  args.grad_out = grad_out.const_data_ptr();
  Tensor grad_y = at::empty(y.sizes(), y.options());
  args.grad_y = grad_y.mutable_data_ptr();
  Tensor sums = at::empty({args.batch, args.frames, split.parts, args.width}, y.options().dtype(at::kFloat));
  args.gate_sums = sums.mutable_data_ptr<float>();
  check_launch(op, launch_gated_add_backward(args, device.stream));
  return {grad_y, add_parts(op, sums, gate.sizes(), gate, device.stream)};
}

// --- rms_norm_silu ---

Tensor rms_norm_silu(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& before_,
                     double eps) {
  check_rms_norm_silu(x_, weight_, before_);
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_), weight = read_by_kernels(weight_);
  const Tensor before = before_ ? with_dense_rows(*before_) : x.narrow(1, 0, 0);
  RmsNormSiluArgs args{};
  args.x = x.const_data_ptr();
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  args.weight = source(weight);
  args.before = before.const_data_ptr();
  args.before_batch = before.stride(0);
  args.before_token = before.stride(1);
  args.batch = x.size(0);
  args.leading = before.size(1);
  args.tokens = x.size(1);
  args.width = static_cast<int32_t>(x.size(2));
  args.eps = static_cast<float>(eps);
  args.element = element_of(x);
  Tensor out = at::empty({x.size(0), before.size(1) + x.size(1), x.size(2)}, x.options());
  args.out = out.mutable_data_ptr();
  check_launch("rms_norm_silu", launch_rms_norm_silu(args, device.stream));
  return out;
}

}  // namespace
}  // namespace stream_r1::cuda

TORCH_LIBRARY_IMPL(stream_r1, STREAM_R1_CUDA_KEY, m) {
  m.impl("qk_norm_rotary", stream_r1::cuda::qk_norm_rotary);
  m.impl("qk_norm_rotary_into", stream_r1::cuda::qk_norm_rotary_into);
  m.impl("qk_norm_rotary_backward", stream_r1::cuda::qk_norm_rotary_backward);
  m.impl("modulated_norm", stream_r1::cuda::modulated_norm);
  m.impl("modulated_norm_backward", stream_r1::cuda::modulated_norm_backward);
  m.impl("gated_add", stream_r1::cuda::gated_add);
  m.impl("gated_add_backward", stream_r1::cuda::gated_add_backward);
  m.impl("rms_norm_silu", stream_r1::cuda::rms_norm_silu);
}
