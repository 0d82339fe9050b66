// qk_norm_rotary, modulated_norm, gated_add, rms_norm_silu, rms_norm and quantize_rows on CUDA: checks,
// allocation and registration.

#include "common/checks.h"
#include "cuda/column_sums.h"
#include "cuda/gated_add.h"
#include "cuda/modulated_norm.h"
#include "cuda/qk_norm_rotary.h"
#include "cuda/quantize_rows.h"
#include "cuda/rms_norm_silu.h"
#include "cuda/tensors.h"

namespace stream_r1::cuda {
namespace {

const Dtype kFp8{aoti_torch_dtype_float8_e4m3fn()};

// sums [units, parts, D] -> [units, D] in the shape and type of `like`.
Tensor add_parts(const char* op, const float* sums, int64_t units, int64_t parts, const Tensor& like,
                 Stream stream) {
  Tensor out = allocate(like.sizes(), like);
  const int64_t width = units == 0 ? 0 : out.numel() / units;
  if (parts * width == 0) units = 0;
  check_launch(op, launch_add_parts({sums, target(out), units, parts, width}, stream));
  return out;
}

// Kernels read weights in float32, bfloat16 and float16.
Tensor read_by_kernels(const Tensor& weight) {
  return dtype_of(weight) == kDouble ? to_dtype(weight, kFloat) : without_gaps(weight);
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
        cos(contiguous_float(cos_)),
        sin(contiguous_float(sin_)) {
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
                           const Tensor& cos, const Tensor& sin, int64_t heads, double eps, Tensor k_out) {
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
  const Tensor upstream[2] = {with_dense_rows(to_dtype(grad_q_, dtype_of(q))),
                              with_dense_rows(to_dtype(grad_k_, dtype_of(k)))};
  const int64_t rows = q.size(0) * q.size(1), width = q.size(2);
  const Parts split(rows);
  args.parts = split.parts;
  args.rows_a_part = split.rows_a_part;
  Tensor grads[2] = {allocate(q.sizes(), q), allocate(k.sizes(), k)};
  Tensor inverse_rms = allocate({2, rows}, kFloat, q);
  Tensor sums = allocate({2, split.parts, width}, kFloat, q);
  for (int i = 0; i < 2; ++i) {
    rotary.set_heads(i, upstream[i]);
    args.sides[i].grad_x = grads[i].mutable_data_ptr();
    args.sides[i].inverse_rms = inverse_rms.mutable_data_ptr<float>() + i * rows;
    args.sides[i].weight_sums = sums.mutable_data_ptr<float>() + i * split.parts * width;
  }
  check_launch("qk_norm_rotary", launch_norm_rotary_backward(args, device.stream));
  return {grads[0], grads[1],
          add_parts("qk_norm_rotary", args.sides[0].weight_sums, 1, split.parts, q_weight, device.stream),
          add_parts("qk_norm_rotary", args.sides[1].weight_sums, 1, split.parts, k_weight, device.stream)};
}

// --- modulated_norm ---

ModulatedNormArgs norm_arguments(const Tensor& x, const Tensor& scale) {
  ModulatedNormArgs args{};
  args.x = x.const_data_ptr();
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  args.scale = source(scale);
  args.scale_batch = scale.stride(0);
  args.scale_frame = scale.stride(1);
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.frames = scale.size(1);
  args.width = static_cast<int32_t>(x.size(2));
  args.element = element_of(x);
  return args;
}

void set_shift(ModulatedNormArgs& args, const Tensor& shift) {
  args.shift = source(shift);
  args.shift_batch = shift.stride(0);
  args.shift_frame = shift.stride(1);
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm(const Tensor& x_, const Tensor& shift_,
                                                  const Tensor& scale_, double eps) {
  const char* op = "modulated_norm";
  check_norm_modulation(op, x_, shift_, scale_);
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_), shift = with_dense_rows(shift_), scale = with_dense_rows(scale_);
  Tensor out = allocate(x.sizes(), x);
  Tensor mean = allocate({x.size(0), x.size(1)}, kFloat, x), rstd = allocate(mean.sizes(), kFloat, x);
  ModulatedNormArgs args = norm_arguments(x, scale);
  set_shift(args, shift);
  args.mean = mean.mutable_data_ptr<float>();
  args.rstd = rstd.mutable_data_ptr<float>();
  args.out = out.mutable_data_ptr();
  args.eps = static_cast<float>(eps);
  check_launch(op, launch_modulated_norm(args, device.stream));
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor> modulated_norm_fp8(const Tensor& x_, const Tensor& shift_, const Tensor& scale_,
                                              double eps) {
  const char* op = "modulated_norm_fp8";
  check_norm_modulation(op, x_, shift_, scale_);
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_), shift = with_dense_rows(shift_), scale = with_dense_rows(scale_);
  Tensor out = allocate(x.sizes(), kFp8, x), row_scale = allocate({x.size(0), x.size(1), 1}, kFloat, x);
  ModulatedNormArgs args = norm_arguments(x, scale);
  set_shift(args, shift);
  args.out = out.mutable_data_ptr();
  args.row_scale = row_scale.mutable_data_ptr<float>();
  args.eps = static_cast<float>(eps);
  check_launch(op, launch_modulated_norm_fp8(args, device.stream));
  return {out, row_scale};
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
  const Tensor grad_out = without_gaps(to_dtype(grad_out_, dtype_of(x_))), x = with_dense_rows(x_),
               scale = with_dense_rows(scale_), mean = without_gaps(mean_), rstd = without_gaps(rstd_);
  ModulatedNormArgs args = norm_arguments(x, scale);
  args.mean = const_cast<float*>(mean.const_data_ptr<float>());
  args.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  const Parts split(args.tokens / args.frames);
  args.parts = split.parts;
  args.rows_a_part = split.rows_a_part;
  args.grad_out = grad_out.const_data_ptr();
  Tensor grad_x = allocate(x.sizes(), x);
  args.grad_x = grad_x.mutable_data_ptr();
  Tensor shift_sums = allocate({args.batch, args.frames, split.parts, args.width}, kFloat, x);
  Tensor scale_sums = allocate(shift_sums.sizes(), kFloat, x);
  const int64_t units = args.batch * args.frames;
  args.shift_sums = shift_sums.mutable_data_ptr<float>();
  args.scale_sums = scale_sums.mutable_data_ptr<float>();
  check_launch(op, launch_modulated_norm_backward(args, device.stream));
  return {grad_x, add_parts(op, args.shift_sums, units, split.parts, scale, device.stream),
          add_parts(op, args.scale_sums, units, split.parts, scale, device.stream)};
}

// --- gated_add ---

GatedAddArgs gate_arguments(const Tensor& x, const Tensor& y, const Tensor& gate) {
  STREAM_R1_CHECK(dtype_of(x) == dtype_of(y) || dtype_of(x) == kFloat, "gated_add: y: expected ", dtype_of(x),
                  " as x, or a float32 x, got ", dtype_of(y));
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
  Tensor out = allocate(x.sizes(), x);
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
  const Tensor grad_out = without_gaps(grad_out_), y = with_dense_rows(y_), gate = with_dense_rows(gate_);
  GatedAddArgs args = gate_arguments(grad_out, y, gate);
  const Parts split(args.tokens / args.frames);
  args.parts = split.parts;
  args.rows_a_part = split.rows_a_part;
  args.grad_out = grad_out.const_data_ptr();
  Tensor grad_y = allocate(y.sizes(), y);
  args.grad_y = grad_y.mutable_data_ptr();
  Tensor sums = allocate({args.batch, args.frames, split.parts, args.width}, kFloat, y);
  args.gate_sums = sums.mutable_data_ptr<float>();
  check_launch(op, launch_gated_add_backward(args, device.stream));
  return {grad_y, add_parts(op, args.gate_sums, args.batch * args.frames, split.parts, gate, device.stream)};
}

// --- rms_norm_silu, rms_norm ---

Tensor normed(const char* op, const Tensor& x_, const Tensor& weight_, const OptionalTensor& before_,
              double eps, bool silu) {
  if (silu)
    check_rms_norm_silu(x_, weight_, before_);
  else
    check_rms_norm(op, x_, weight_);
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_), weight = read_by_kernels(weight_);
  const Tensor before = before_ ? with_dense_rows(*before_) : x;  // of x none is read
  RmsNormSiluArgs args{};
  args.x = x.const_data_ptr();
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  args.weight = source(weight);
  args.before = before.const_data_ptr();
  args.before_batch = before.stride(0);
  args.before_token = before.stride(1);
  args.batch = x.size(0);
  args.leading = before_ ? before.size(1) : 0;
  args.tokens = x.size(1);
  args.width = static_cast<int32_t>(x.size(2));
  args.eps = static_cast<float>(eps);
  args.element = element_of(x);
  Tensor out = allocate({x.size(0), args.leading + x.size(1), x.size(2)}, x);
  args.out = out.mutable_data_ptr();
  check_launch(op, launch_rms_norm_silu(args, silu, device.stream));
  return out;
}

Tensor rms_norm_silu(const Tensor& x, const Tensor& weight, const OptionalTensor& before, double eps) {
  return normed("rms_norm_silu", x, weight, before, eps, true);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return normed("rms_norm", x, weight, std::nullopt, eps, false);
}

// --- quantize_rows ---

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_, bool gelu) {
  STREAM_R1_CHECK(x_.dim() == 3 && x_.size(2) > 0, "quantize_rows: x: expected shape [B, T, K > 0], got ",
                  x_.sizes());
  const OnDevice device(x_);
  const Tensor x = with_dense_rows(x_);
  Tensor data = allocate(x.sizes(), kFp8, x), scale = allocate({x.size(0), x.size(1), 1}, kFloat, x);
  QuantizeRowsArgs args{};
  args.x = x.const_data_ptr();
  args.x_batch = x.stride(0);
  args.x_token = x.stride(1);
  args.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  args.scale = scale.mutable_data_ptr<float>();
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.width = static_cast<int32_t>(x.size(2));
  args.gelu = gelu ? 1 : 0;
  args.element = element_of(x);
  check_launch("quantize_rows", launch_quantize_rows(args, device.stream));
  return {data, scale};
}

}  // namespace
}  // namespace stream_r1::cuda

STREAM_R1_REGISTER(STREAM_R1_CUDA_KEY, m) {
  m.impl("qk_norm_rotary", TORCH_BOX(&stream_r1::cuda::qk_norm_rotary));
  m.impl("qk_norm_rotary_into", TORCH_BOX(&stream_r1::cuda::qk_norm_rotary_into));
  m.impl("qk_norm_rotary_backward", TORCH_BOX(&stream_r1::cuda::qk_norm_rotary_backward));
  m.impl("modulated_norm", TORCH_BOX(&stream_r1::cuda::modulated_norm));
  m.impl("modulated_norm_fp8", TORCH_BOX(&stream_r1::cuda::modulated_norm_fp8));
  m.impl("modulated_norm_backward", TORCH_BOX(&stream_r1::cuda::modulated_norm_backward));
  m.impl("gated_add", TORCH_BOX(&stream_r1::cuda::gated_add));
  m.impl("gated_add_backward", TORCH_BOX(&stream_r1::cuda::gated_add_backward));
  m.impl("quantize_rows", TORCH_BOX(&stream_r1::cuda::quantize_rows));
  m.impl("rms_norm_silu", TORCH_BOX(&stream_r1::cuda::rms_norm_silu));
  m.impl("rms_norm", TORCH_BOX(&stream_r1::cuda::rms_norm));
}
