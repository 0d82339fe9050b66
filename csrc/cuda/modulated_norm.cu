#include "cuda/modulated_norm.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Fp16;
using stream_r1::cuda::ModulatedNormArgs;

#define STREAM_R1_MODULATED_NORM(suffix, T)                                                     \
  extern "C" __global__ void __launch_bounds__(256, 3)                                          \
      modulated_norm_##suffix(const __grid_constant__ ModulatedNormArgs args) {                 \
    stream_r1::cuda::modulated_norm<T>(args);                                                   \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 3)                                          \
      modulated_norm_grad_x_##suffix(const __grid_constant__ ModulatedNormArgs args) {          \
    stream_r1::cuda::modulated_norm_grad_x<T>(args);                                            \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 3)                                          \
      modulated_norm_grad_modulation_##suffix(const __grid_constant__ ModulatedNormArgs args) { \
    stream_r1::cuda::modulated_norm_grad_modulation<T>(args);                                   \
  }

STREAM_R1_MODULATED_NORM(fp32, float)
STREAM_R1_MODULATED_NORM(bf16, Bf16)
STREAM_R1_MODULATED_NORM(fp16, Fp16)

namespace stream_r1::cuda {

LaunchError launch_modulated_norm(const ModulatedNormArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0 || args.width == 0) return nullptr;
  const auto kernel = by_element(args.element, modulated_norm_fp32, modulated_norm_bf16, modulated_norm_fp16);
  kernel<<<blocks_for(rows, kNormWarps), kNormWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_modulated_norm_backward(const ModulatedNormArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens, units = args.batch * args.frames;
  if (units == 0 || args.width == 0) return nullptr;
  if (rows > 0) {
    const auto kernel = by_element(args.element, modulated_norm_grad_x_fp32, modulated_norm_grad_x_bf16,
                                   modulated_norm_grad_x_fp16);
    kernel<<<blocks_for(rows, kNormWarps), kNormWarps * kWarp, 0, stream>>>(args);
  }
  const auto kernel = by_element(args.element, modulated_norm_grad_modulation_fp32,
                                 modulated_norm_grad_modulation_bf16, modulated_norm_grad_modulation_fp16);
  const dim3 grid(static_cast<unsigned>(units * args.parts), blocks_for(args.width, kSumColumns));
  kernel<<<grid, kSumThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
