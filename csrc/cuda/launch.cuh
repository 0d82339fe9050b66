// What the launch functions share, for the files that nvcc compiles.

#pragma once

#include <cuda_runtime_api.h>

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

template <class Kernel>
Kernel* by_element(Element element, Kernel* float32, Kernel* bfloat16, Kernel* float16) {
  return element == Element::float32 ? float32 : element == Element::bfloat16 ? bfloat16 : float16;
}

inline LaunchError launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace stream_r1::cuda
