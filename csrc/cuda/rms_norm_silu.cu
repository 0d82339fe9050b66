#include "cuda/rms_norm_silu.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_RMS_NORM(suffix, T)                                                       \
  STREAM_R1_KERNEL(rms_norm_silu_##suffix, 256, 3, RmsNormSiluArgs, rms_norm_silu<T, true>) \
  STREAM_R1_KERNEL(rms_norm_##suffix, 256, 3, RmsNormSiluArgs, rms_norm_silu<T, false>)

STREAM_R1_RMS_NORM(fp32, float)
STREAM_R1_RMS_NORM(bf16, Bf16)
STREAM_R1_RMS_NORM(fp16, Fp16)

LaunchError launch_rms_norm_silu(RmsNormSiluArgs args, bool silu, Stream stream) {
  const int64_t rows = args.batch * (args.leading + args.tokens);
  if (rows == 0 || args.width == 0) return nullptr;
  args.lanes = 1;
  while (args.lanes < kWarp && args.lanes * kPack < args.width) args.lanes *= 2;
  args.whole = args.width % kPack == 0 &&
               rows_start_aligned(args.x, args.element, {args.x_batch, args.x_token}) &&
               rows_start_aligned(args.before, args.element, {args.before_batch, args.before_token}) &&
               rows_start_aligned(args.weight.data, args.weight.element, {}) &&
               rows_start_aligned(args.out, args.element, {args.width});
  const auto kernel =
      silu ? STREAM_R1_BY_ELEMENT(args.element, rms_norm_silu) : STREAM_R1_BY_ELEMENT(args.element, rms_norm);
  kernel<<<blocks_for(rows, kSiluThreads / args.lanes), kSiluThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
