// What the launch functions share, for the files that nvcc compiles.

#pragma once

#include <cuda_runtime_api.h>

#include "common/views.h"
#include "cuda/launch.h"

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
