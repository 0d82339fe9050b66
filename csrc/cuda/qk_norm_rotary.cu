#include "cuda/qk_norm_rotary.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Fp16;
using stream_r1::cuda::NormRotaryArgs;

#define STREAM_R1_NORM_ROTARY(suffix, T)                                              \
  extern "C" __global__ void __launch_bounds__(256, 3)                                \
      norm_rotary_##suffix(const __grid_constant__ NormRotaryArgs args) {             \
    stream_r1::cuda::norm_rotary<T>(args);                                            \
  }                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3)                                \
      norm_rotary_grad_x_##suffix(const __grid_constant__ NormRotaryArgs args) {      \
    stream_r1::cuda::norm_rotary_grad_x<T>(args);                                     \
  }                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3)                                \
      norm_rotary_grad_weight_##suffix(const __grid_constant__ NormRotaryArgs args) { \
    stream_r1::cuda::norm_rotary_grad_weight<T>(args);                                \
  }

STREAM_R1_NORM_ROTARY(fp32, float)
STREAM_R1_NORM_ROTARY(bf16, Bf16)
STREAM_R1_NORM_ROTARY(fp16, Fp16)

namespace stream_r1::cuda {

LaunchError launch_norm_rotary(const NormRotaryArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows * args.heads * args.head_dim == 0) return nullptr;
  const auto kernel = by_element(args.element, norm_rotary_fp32, norm_rotary_bf16, norm_rotary_fp16);
  kernel<<<dim3(blocks_for(rows, kRotaryWarps), 2), kRotaryWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_norm_rotary_backward(const NormRotaryArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (args.heads * args.head_dim == 0) return nullptr;
  if (rows > 0) {
    const auto kernel =
        by_element(args.element, norm_rotary_grad_x_fp32, norm_rotary_grad_x_bf16, norm_rotary_grad_x_fp16);
    kernel<<<dim3(blocks_for(rows, kRotaryWarps), 2), kRotaryWarps * kWarp, 0, stream>>>(args);
  }
  const auto kernel = by_element(args.element, norm_rotary_grad_weight_fp32, norm_rotary_grad_weight_bf16,
                                 norm_rotary_grad_weight_fp16);
  const unsigned columns = blocks_for(int64_t(args.heads) * args.head_dim, kSumColumns);
  kernel<<<dim3(static_cast<unsigned>(args.parts), columns, 2), kSumThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
