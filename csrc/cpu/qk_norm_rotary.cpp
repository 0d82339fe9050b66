// qk_norm_rotary: checks, allocation and registration. The loops are in qk_norm_rotary_kernel.cpp.

#include "common/checks.h"
#include "cpu/qk_norm_rotary_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

// q, k and what goes with them, in the layout that the kernel needs; keeps their memory alive.
struct QkJob {
  const Tensor x[2], weight[2], cos, sin;
  NormRotaryArgs args{};

  QkJob(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
        const Tensor& cos_any, const Tensor& sin_any, int64_t heads, double eps)
      : x{with_dense_rows(q), with_dense_rows(k)},
        weight{contiguous_float(q_weight), contiguous_float(k_weight)},
        cos(contiguous_float(cos_any)),
        sin(contiguous_float(sin_any)) {
    args.tokens = q.size(1);
    args.heads = heads;
    args.head_dim = q.size(2) / heads;
    args.eps = static_cast<float>(eps);
    args.cos = cos.const_data_ptr<float>();
    args.sin = sin.const_data_ptr<float>();
    args.element = element_of(q);
    for (int i = 0; i < 2; ++i) {
      args.sides[i].x = source(x[i]);
      args.sides[i].x_batch = x[i].stride(0);
      args.sides[i].x_token = x[i].stride(1);
      args.sides[i].weight = weight[i].const_data_ptr<float>();
    }
  }

  // y [B, T, H, D] of q (0) or k (1)
  void set_strides(int side, const Tensor& y) {
    args.sides[side].y_batch = y.stride(0);
    args.sides[side].y_token = y.stride(1);
    args.sides[side].y_head = y.stride(2);
  }

  void set_out(int side, const Tensor& out) {
    args.sides[side].out = target(out);
    args.sides[side].past_cache = goes_past_cache(out);
  }

  void run(const Tensor& q_out, const Tensor& k_out) {
    set_out(0, q_out);
    set_out(1, k_out);
    set_strides(0, q_out);
    set_strides(1, k_out);
    parallel_for(
        0, x[0].size(0) * args.tokens, grain(2 * x[0].size(2)),
        [this, kernel = pick_norm_rotary()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor> qk_norm_rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                          const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                                          int64_t heads, double eps) {
  check_rotary(q, k, q_weight, k_weight, cos, sin, heads);
  Tensor q_out = empty_heads(q, heads), k_out = empty_heads(k, heads);
  QkJob(q, k, q_weight, k_weight, cos, sin, heads, eps).run(q_out, k_out);
  return {q_out, k_out};
}

Tensor qk_norm_rotary_into(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                           const Tensor& cos, const Tensor& sin, int64_t heads, double eps, Tensor k_out) {
  check_rotary(q, k, q_weight, k_weight, cos, sin, heads);
  check_key_slot(k_out, q, k, q_weight, k_weight, cos, sin, heads);
  Tensor q_out = empty_heads(q, heads);
  QkJob(q, k, q_weight, k_weight, cos, sin, heads, eps).run(q_out, k_out);
  return q_out;
}

// The gradient of q's (0) or k's (1) weight from sums [parts, 2, H * D], in a fixed order: for any number of
// threads the same.
Tensor sum_of_side(const Tensor& sums, int64_t side, Dtype dtype) {
  const int64_t parts = sums.size(0), width = sums.size(2);
  Tensor total = allocate_zeros({width}, kFloat, sums);
  float* to = total.mutable_data_ptr<float>();
  for (int64_t part = 0; part < parts; ++part) {
    const float* from = sums.const_data_ptr<float>() + (2 * part + side) * width;
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
  return to_dtype(total, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rotary_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, const Tensor& q_weight,
    const Tensor& k_weight, const Tensor& cos, const Tensor& sin, int64_t heads, double eps) {
  check_rotary(q, k, q_weight, k_weight, cos, sin, heads);
  for (const Tensor& grad : {grad_q, grad_k})
    check_sizes("qk_norm_rotary_backward", "grad_q, grad_k", grad,
                {q.size(0), q.size(1), heads, q.size(2) / heads});
  QkJob job(q, k, q_weight, k_weight, cos, sin, heads, eps);
  const Tensor incoming[2] = {with_dense_rows(grad_q), with_dense_rows(grad_k)};
  Tensor grads[2] = {allocate(q.sizes(), q), allocate(k.sizes(), k)};
  for (int i = 0; i < 2; ++i) {
    job.args.sides[i].grad_out = source(incoming[i]);
    job.set_out(i, grads[i]);
    job.set_strides(i, incoming[i]);
  }
  const int64_t rows = q.size(0) * q.size(1), width = q.size(2);
  const int64_t part_rows = std::max<int64_t>(64, (rows + 63) / 64);
  const int64_t parts = std::max<int64_t>(1, (rows + part_rows - 1) / part_rows);
  Tensor sums = allocate_zeros({parts, 2, width}, kFloat, q);
  parallel_for(0, parts, grain(2 * width * part_rows),
               [&, kernel = pick_norm_rotary_backward()](int64_t begin, int64_t end) {
                 for (int64_t part = begin; part < end; ++part)
                   kernel(job.args, part * part_rows, std::min(rows, (part + 1) * part_rows),
                          sums.mutable_data_ptr<float>() + part * 2 * width);
               });
  return {grads[0], grads[1], sum_of_side(sums, 0, dtype_of(q_weight)),
          sum_of_side(sums, 1, dtype_of(k_weight))};
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) {
  m.impl("qk_norm_rotary", TORCH_BOX(&stream_r1::qk_norm_rotary));
  m.impl("qk_norm_rotary_into", TORCH_BOX(&stream_r1::qk_norm_rotary_into));
  m.impl("qk_norm_rotary_backward", TORCH_BOX(&stream_r1::qk_norm_rotary_backward));
}
