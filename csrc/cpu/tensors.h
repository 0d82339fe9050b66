// What the CPU ops do with tensors beside common/tensors.h.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/registration.h"
#include "common/tensors.h"

namespace stream_r1 {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Sums of blocks, float32 [..., blocks, D] -> [..., D], always in the same order.
inline Tensor sum_blocks(const Tensor& sums, Dtype dtype) {
  const Sizes sizes = sums.sizes();
  const int64_t blocks = sizes[sizes.size() - 2], width = sizes[sizes.size() - 1];
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 2);
  const int64_t groups = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  shape.push_back(width);
  if (blocks == 1) return to_dtype(torch::stable::view(sums, shape), dtype);
  Tensor totals = allocate_zeros(shape, kFloat, sums);
  const float* from = sums.const_data_ptr<float>();
  float* to = totals.mutable_data_ptr<float>();
  for (int64_t group = 0; group < groups; ++group, to += width)
    for (int64_t block = 0; block < blocks; ++block, from += width)
      for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  return to_dtype(totals, dtype);
}

// Is a result more than a core's share of the last cache keeps until it is read again, and are its rows
// aligned so that a kernel may store them past the caches?
inline bool goes_past_cache(const Tensor& out) {
  constexpr size_t kCacheKeeps = 24 << 20;
  const size_t item = aoti_torch_dtype_element_size(dtype_of(out).code);
  if (out.numel() * item <= kCacheKeeps) return false;
  if (reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 != 0) return false;
  const Sizes strides = out.strides();
  for (size_t d = 0; d + 1 < strides.size(); ++d)
    if (strides[d] * item % 64 != 0) return false;
  return true;
}

// Units of work for one task of parallel_for: a task smaller than some ten thousand elements costs more to
// hand over than to do.
inline int64_t grain(int64_t elements_a_unit) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_a_unit));
}

}  // namespace stream_r1
