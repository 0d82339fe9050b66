// What the CPU ops do with tensors beside common/tensors.h.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "common/tensors.h"

namespace stream_r1 {

// Sums of blocks, float32 [..., blocks, D] -> [..., D], always in the same order.
inline at::Tensor sum_blocks(const at::Tensor& sums, at::ScalarType dtype) {
  const int64_t dims = sums.dim(), blocks = sums.size(dims - 2), width = sums.size(dims - 1);
  const auto lead = sums.sizes().slice(0, dims - 2);
  std::vector<int64_t> shape(lead.begin(), lead.end());
  shape.push_back(width);
  if (blocks == 1) return sums.view(shape).to(dtype);
  at::Tensor totals = at::zeros(shape, sums.options());
  const float* from = sums.const_data_ptr<float>();
  float* to = totals.mutable_data_ptr<float>();
  for (int64_t group = 0; group < c10::multiply_integers(lead); ++group, to += width)
    for (int64_t block = 0; block < blocks; ++block, from += width)
      for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  return totals.to(dtype);
}

// Forward-mode derivatives would be lost without a word: a tangent is no requires_grad.
inline void refuse_tangents(at::TensorList inputs) {
  for (const at::Tensor& input : inputs)
    TORCH_CHECK_NOT_IMPLEMENTED(
        !input.defined() || !input._fw_grad(/*level=*/0).defined(),
        "stream_r1: the compiled ops have no forward-mode derivatives (torch.func.jvp); expected tensors "
        "without a tangent, or backend='reference', got one of shape ",
        input.sizes(), " with a tangent");
}

// Does autograd have to record an op with these inputs? Recording costs as much as a small op itself.
inline bool needs_graph(at::TensorList inputs) {
  refuse_tangents(inputs);
  return at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& input) {
           return input.requires_grad();
         });
}

// Is a result more than a core's share of the last cache keeps until it is read again, and are its rows
// aligned so that a kernel may store them past the caches?
inline bool goes_past_cache(const at::Tensor& out) {
  constexpr size_t kCacheKeeps = 24 << 20;
  if (out.nbytes() <= kCacheKeeps) return false;
  if (reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 != 0) return false;
  for (int64_t d = 0; d + 1 < out.dim(); ++d)
    if (out.stride(d) * out.itemsize() % 64 != 0) return false;
  return true;
}

// Units of work for one task of at::parallel_for: a task smaller than some ten thousand elements costs more
// to hand over than to do.
inline int64_t grain(int64_t elements_a_unit) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_a_unit));
}

}  // namespace stream_r1
