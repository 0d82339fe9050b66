#include "cuda/dmd.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Element;
using stream_r1::Fp16;
using stream_r1::cuda::DmdArgs;
using stream_r1::cuda::DmdScaleArgs;

#define STREAM_R1_DMD(suffix, T)                                      \
  extern "C" __global__ void __launch_bounds__(256, 3)                \
      dmd_distances_##suffix(const __grid_constant__ DmdArgs args) {  \
    stream_r1::cuda::dmd_distances<T>(args);                          \
  }                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3)                \
      dmd_directions_##suffix(const __grid_constant__ DmdArgs args) { \
    stream_r1::cuda::dmd_directions<T, T, false>(args);               \
  }                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3)                \
      dmd_gradient_##suffix(const __grid_constant__ DmdArgs args) {   \
    stream_r1::cuda::dmd_directions<T, T, true>(args);                \
  }                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3)                \
      dmd_scale_##suffix(const __grid_constant__ DmdScaleArgs args) { \
    stream_r1::cuda::dmd_scale<T>(args);                              \
  }

STREAM_R1_DMD(fp32, float)
STREAM_R1_DMD(bf16, Bf16)
STREAM_R1_DMD(fp16, Fp16)

#define STREAM_R1_DMD_GRADIENT(suffix, T)                           \
  extern "C" __global__ void __launch_bounds__(256, 3)              \
      dmd_gradient_##suffix(const __grid_constant__ DmdArgs args) { \
    stream_r1::cuda::dmd_directions<T, float, true>(args);          \
  }

STREAM_R1_DMD_GRADIENT(bf16_fp32, Bf16)
STREAM_R1_DMD_GRADIENT(fp16_fp32, Fp16)

extern "C" __global__ void __launch_bounds__(256, 3) dmd_sum_loss(const __grid_constant__ DmdArgs args) {
  stream_r1::cuda::sum_loss(args);
}

namespace stream_r1::cuda {
namespace {

using DmdKernel = void(DmdArgs);

dim3 grid_of(const DmdArgs& args) {
  return dim3(static_cast<unsigned>(args.blocks), static_cast<unsigned>(args.batch));
}

void launch_distances(const DmdArgs& args, Stream stream) {
  const auto kernel = by_element(args.element, dmd_distances_fp32, dmd_distances_bf16, dmd_distances_fp16);
  kernel<<<grid_of(args), kDmdThreads, 0, stream>>>(args);
}

}  // namespace

LaunchError launch_dmd_loss(const DmdArgs& args, Stream stream) {
  if (args.batch > 0) {
    launch_distances(args, stream);
    const auto kernel =
        by_element(args.element, dmd_directions_fp32, dmd_directions_bf16, dmd_directions_fp16);
    kernel<<<grid_of(args), kDmdThreads, 0, stream>>>(args);
  }
  dmd_sum_loss<<<1, kDmdThreads, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_dmd_gradient(const DmdArgs& args, Stream stream) {
  if (args.batch == 0) return nullptr;
  launch_distances(args, stream);
  DmdKernel* kernel =
      by_element<DmdKernel>(args.element, dmd_gradient_fp32, dmd_gradient_bf16, dmd_gradient_fp16);
  if (args.direction_element != args.element)
    kernel = args.element == Element::bfloat16 ? dmd_gradient_bf16_fp32 : dmd_gradient_fp16_fp32;
  kernel<<<grid_of(args), kDmdThreads, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_dmd_scale(const DmdScaleArgs& args, Stream stream) {
  if (args.batch == 0 || args.n == 0) return nullptr;
  const auto kernel = by_element(args.element, dmd_scale_fp32, dmd_scale_bf16, dmd_scale_fp16);
  const dim3 grid(blocks_for(args.n, kDmdThreads * kPack), static_cast<unsigned>(args.batch));
  kernel<<<grid, kDmdThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
