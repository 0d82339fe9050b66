#include "cuda/rms_norm_silu.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Fp16;
using stream_r1::cuda::RmsNormSiluArgs;

#define STREAM_R1_RMS_NORM_SILU(suffix, T)                                   \
  extern "C" __global__ void __launch_bounds__(256, 3)                       \
      rms_norm_silu_##suffix(const __grid_constant__ RmsNormSiluArgs args) { \
    stream_r1::cuda::rms_norm_silu<T>(args);                                 \
  }

STREAM_R1_RMS_NORM_SILU(fp32, float)
STREAM_R1_RMS_NORM_SILU(bf16, Bf16)
STREAM_R1_RMS_NORM_SILU(fp16, Fp16)

namespace stream_r1::cuda {

LaunchError launch_rms_norm_silu(RmsNormSiluArgs args, Stream stream) {
  const int64_t rows = args.batch * (args.leading + args.tokens);
  if (rows == 0 || args.width == 0) return nullptr;
  args.lanes = 1;
  while (args.lanes < kWarp && args.lanes * kPack < args.width) args.lanes *= 2;
  const auto kernel = by_element(args.element, rms_norm_silu_fp32, rms_norm_silu_bf16, rms_norm_silu_fp16);
  kernel<<<blocks_for(rows, kSiluThreads / args.lanes), kSiluThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
