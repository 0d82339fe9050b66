#include "cuda/rms_norm_silu.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

STREAM_R1_KERNEL(rms_norm_silu_fp32, 256, 3, RmsNormSiluArgs, rms_norm_silu<float>)
STREAM_R1_KERNEL(rms_norm_silu_bf16, 256, 3, RmsNormSiluArgs, rms_norm_silu<Bf16>)
STREAM_R1_KERNEL(rms_norm_silu_fp16, 256, 3, RmsNormSiluArgs, rms_norm_silu<Fp16>)

LaunchError launch_rms_norm_silu(RmsNormSiluArgs args, Stream stream) {
  const int64_t rows = args.batch * (args.leading + args.tokens);
  if (rows == 0 || args.width == 0) return nullptr;
  args.lanes = 1;
  while (args.lanes < kWarp && args.lanes * kPack < args.width) args.lanes *= 2;
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, rms_norm_silu);
  kernel<<<blocks_for(rows, kSiluThreads / args.lanes), kSiluThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
