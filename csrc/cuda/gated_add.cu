#include "cuda/gated_add.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Element;
using stream_r1::Fp16;
using stream_r1::cuda::GatedAddArgs;

#define STREAM_R1_GATED_ADD(suffix, X, Y)                                      \
  extern "C" __global__ void __launch_bounds__(256, 3)                         \
      gated_add_##suffix(const __grid_constant__ GatedAddArgs args) {          \
    stream_r1::cuda::gated_add<X, Y>(args);                                    \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 3)                         \
      gated_add_backward_##suffix(const __grid_constant__ GatedAddArgs args) { \
    stream_r1::cuda::gated_add_backward<X, Y>(args);                           \
  }

STREAM_R1_GATED_ADD(fp32, float, float)
STREAM_R1_GATED_ADD(bf16, Bf16, Bf16)
STREAM_R1_GATED_ADD(fp16, Fp16, Fp16)
STREAM_R1_GATED_ADD(fp32_bf16, float, Bf16)
STREAM_R1_GATED_ADD(fp32_fp16, float, Fp16)

namespace stream_r1::cuda {
namespace {

using GateKernel = void(GatedAddArgs);

GateKernel* pick(const GatedAddArgs& args, bool backward) {
  if (args.x_element == args.y_element)
    return backward ? by_element<GateKernel>(args.x_element, gated_add_backward_fp32, gated_add_backward_bf16,
                                             gated_add_backward_fp16)
                    : by_element<GateKernel>(args.x_element, gated_add_fp32, gated_add_bf16, gated_add_fp16);
  if (args.y_element == Element::bfloat16)
    return backward ? gated_add_backward_fp32_bf16 : gated_add_fp32_bf16;
  return backward ? gated_add_backward_fp32_fp16 : gated_add_fp32_fp16;
}

}  // namespace

LaunchError launch_gated_add(const GatedAddArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0 || args.width == 0) return nullptr;
  pick(args, false)<<<blocks_for(rows, kGateWarps), kGateWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_gated_add_backward(const GatedAddArgs& args, Stream stream) {
  const int64_t units = args.batch * args.frames;
  if (units == 0 || args.width == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(units * args.parts), blocks_for(args.width, kSumColumns));
  pick(args, true)<<<grid, kSumThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
