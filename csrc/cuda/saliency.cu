#include "cuda/saliency.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Fp16;
using stream_r1::cuda::IntraWeightsArgs;
using stream_r1::cuda::RegionSaliencyArgs;

#define STREAM_R1_REGION_SALIENCY(suffix, T)                                      \
  extern "C" __global__ void __launch_bounds__(128, 4)                            \
      region_saliency_##suffix(const __grid_constant__ RegionSaliencyArgs args) { \
    stream_r1::cuda::region_saliency<T>(args);                                    \
  }

STREAM_R1_REGION_SALIENCY(fp32, float)
STREAM_R1_REGION_SALIENCY(bf16, Bf16)
STREAM_R1_REGION_SALIENCY(fp16, Fp16)

extern "C" __global__ void __launch_bounds__(256, 3)
    intra_weights_fuse(const __grid_constant__ IntraWeightsArgs args) {
  stream_r1::cuda::fuse_frame(args);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    intra_weights_weigh(const __grid_constant__ IntraWeightsArgs args) {
  stream_r1::cuda::weigh_frame(args);
}

namespace stream_r1::cuda {

LaunchError launch_region_saliency(const RegionSaliencyArgs& args, Stream stream) {
  const int64_t bands = args.axes * args.batch * args.frames * args.rows;
  if (bands == 0) return nullptr;
  const auto kernel =
      by_element(args.element, region_saliency_fp32, region_saliency_bf16, region_saliency_fp16);
  kernel<<<static_cast<unsigned>(bands), kBandThreads, args.width * sizeof(float), stream>>>(args);
  return launch_error();
}

LaunchError launch_intra_weights(const IntraWeightsArgs& args, Stream stream) {
  const auto frames = static_cast<unsigned>(args.batch * args.frames);
  if (frames == 0) return nullptr;
  intra_weights_fuse<<<frames, kMapThreads, 0, stream>>>(args);
  intra_weights_weigh<<<frames, kMapThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
