// From tensors to what kernels take, on any device.

#pragma once

#include <ATen/ATen.h>

#include "common/views.h"

namespace stream_r1 {

inline Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::float32;
    case at::kBFloat16:
      return Element::bfloat16;
    case at::kHalf:
      return Element::float16;
    default:
      TORCH_CHECK_TYPE(false, "stream_r1: expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline Source source(const at::Tensor& tensor) { return {tensor.const_data_ptr(), element_of(tensor)}; }

inline Target target(const at::Tensor& tensor) { return {tensor.mutable_data_ptr(), element_of(tensor)}; }

// Strides of [B, F, C, h, w]; 0 along what is broadcast.
inline Planes planes(const at::Tensor& tensor) {
  const auto stride = [&](int64_t d) { return tensor.size(d) == 1 ? int64_t{0} : tensor.stride(d); };
  return {stride(0), stride(1), stride(2)};
}

// The tensor itself if its last dimensions lie in memory without gaps, else a contiguous copy.
inline at::Tensor with_dense_rows(const at::Tensor& tensor, int64_t last_dims = 1) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= tensor.dim() - last_dims; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return tensor.contiguous();
    expected *= tensor.size(d);
  }
  return tensor;
}

// The tensor itself if it is float32 without gaps, else a copy that is.
inline at::Tensor contiguous_float(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat && tensor.is_contiguous()) return tensor;
  return tensor.to(at::kFloat).contiguous();
}

// [B, T, H, D] for the heads of x [B, T, H * D].
inline at::Tensor empty_heads(const at::Tensor& x, int64_t heads) {
  return at::empty({x.size(0), x.size(1), heads, x.size(2) / heads}, x.options());
}

}  // namespace stream_r1
