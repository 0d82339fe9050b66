#include "cuda/dmd.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_DMD(suffix, T)                                                          \
  STREAM_R1_KERNEL(dmd_distances_##suffix, 256, 3, DmdArgs, dmd_distances<T>)             \
  STREAM_R1_KERNEL(dmd_directions_##suffix, 256, 3, DmdArgs, dmd_directions<T, T, false>) \
  STREAM_R1_KERNEL(dmd_gradient_##suffix, 256, 3, DmdArgs, dmd_directions<T, T, true>)    \
  STREAM_R1_KERNEL(dmd_scale_##suffix, 256, 3, DmdScaleArgs, dmd_scale<T>)

STREAM_R1_DMD(fp32, float)
STREAM_R1_DMD(bf16, Bf16)
STREAM_R1_DMD(fp16, Fp16)

STREAM_R1_KERNEL(dmd_gradient_bf16_fp32, 256, 3, DmdArgs, dmd_directions<Bf16, float, true>)
STREAM_R1_KERNEL(dmd_gradient_fp16_fp32, 256, 3, DmdArgs, dmd_directions<Fp16, float, true>)
STREAM_R1_KERNEL(dmd_sum_loss, 256, 3, DmdArgs, sum_loss)

namespace {

dim3 grid_of(const DmdArgs& args) {
  return dim3(static_cast<unsigned>(args.blocks), static_cast<unsigned>(args.batch));
}

void launch_distances(const DmdArgs& args, Stream stream) {
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, dmd_distances);
  kernel<<<grid_of(args), kDmdThreads, 0, stream>>>(args);
}

}  // namespace

LaunchError launch_dmd_loss(const DmdArgs& args, Stream stream) {
  if (args.batch > 0) {
    launch_distances(args, stream);
    const auto kernel = STREAM_R1_BY_ELEMENT(args.element, dmd_directions);
    kernel<<<grid_of(args), kDmdThreads, 0, stream>>>(args);
  }
  dmd_sum_loss<<<1, kDmdThreads, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_dmd_gradient(const DmdArgs& args, Stream stream) {
  if (args.batch == 0) return nullptr;
  launch_distances(args, stream);
  auto* kernel = STREAM_R1_BY_ELEMENT(args.element, dmd_gradient);
  if (args.direction_element != args.element)
    kernel = args.element == Element::bfloat16 ? dmd_gradient_bf16_fp32 : dmd_gradient_fp16_fp32;
  kernel<<<grid_of(args), kDmdThreads, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_dmd_scale(const DmdScaleArgs& args, Stream stream) {
  if (args.batch == 0 || args.n == 0) return nullptr;
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, dmd_scale);
  const dim3 grid(blocks_for(args.n, kDmdThreads * kPack), static_cast<unsigned>(args.batch));
  kernel<<<grid, kDmdThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
