#include "cuda/saliency.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

STREAM_R1_KERNEL(region_saliency_fp32, 128, 4, RegionSaliencyArgs, region_saliency<float>)
STREAM_R1_KERNEL(region_saliency_bf16, 128, 4, RegionSaliencyArgs, region_saliency<Bf16>)
STREAM_R1_KERNEL(region_saliency_fp16, 128, 4, RegionSaliencyArgs, region_saliency<Fp16>)
STREAM_R1_KERNEL(intra_weights_fuse, 256, 3, IntraWeightsArgs, fuse_frame)
STREAM_R1_KERNEL(intra_weights_weigh, 256, 3, IntraWeightsArgs, weigh_frame)

LaunchError launch_region_saliency(const RegionSaliencyArgs& args, Stream stream) {
  const int64_t bands = args.axes * args.batch * args.frames * args.rows;
  if (bands == 0) return nullptr;
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, region_saliency);
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
