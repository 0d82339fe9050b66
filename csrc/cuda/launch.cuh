// What the launch functions share, for the files that nvcc compiles.

#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>

#include "common/views.h"
#include "cuda/launch.h"

// A kernel that calls a function, which comes last (its template arguments have commas), on its arguments. In
// blocks of `threads` threads; `blocks` of them fit a processor.
#define STREAM_R1_KERNEL(name, threads, blocks, Args, ...)                                                \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args) { \
    __VA_ARGS__(args);                                                                                    \
  }

// Of the kernels name_fp32, name_bf16 and name_fp16 the one for an element.
#define STREAM_R1_BY_ELEMENT(element, name) by_element(element, name##_fp32, name##_bf16, name##_fp16)

namespace stream_r1::cuda {

inline unsigned blocks_for(int64_t items, int64_t items_a_block) {
  return static_cast<unsigned>((items + items_a_block - 1) / items_a_block);
}

constexpr int kRowBlocks = 3;  // that fit a processor, of most row kernels: compiled for at least so many

struct RowGrid {
  unsigned blocks;
  int64_t rows_a_warp;
};

// Blocks of `warps` warps, of which `fitting` fit a processor, for `rows` rows, each `sides` times. With a
// row for each warp a few blocks would have to wait for the others to end and then be nearly alone; so warps
// get several rows, up to four, such that all blocks run at once. Where four are not enough there are many
// rounds, and the last one matters little.
inline LaunchError row_grid(int64_t rows, int warps, int fitting, int sides, RowGrid& grid) {
  Device device{};
  const LaunchError error = current_device(device);
  if (error != nullptr) return error;
  const int64_t at_once = int64_t(fitting) * device.processors * warps;
  int64_t rows_a_warp = (sides * rows + at_once - 1) / at_once;
  rows_a_warp = rows_a_warp < 1 ? 1 : rows_a_warp > 4 ? 4 : rows_a_warp;
  grid = {blocks_for(rows, warps * rows_a_warp), rows_a_warp};
  return nullptr;
}

// Does every row start at a multiple of 16 bytes? Strides in elements.
inline bool rows_start_aligned(const void* data, Element element, std::initializer_list<int64_t> strides) {
  const int64_t size = element == Element::float32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) aligned &= stride * size % 16 == 0;
  return aligned;
}

template <class Kernel>
Kernel* by_element(Element element, Kernel* float32, Kernel* bfloat16, Kernel* float16) {
  return element == Element::float32 ? float32 : element == Element::bfloat16 ? bfloat16 : float16;
}

inline LaunchError launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace stream_r1::cuda
