#include "cuda/column_sums.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

using stream_r1::cuda::AddPartsArgs;

extern "C" __global__ void __launch_bounds__(256) add_parts(const __grid_constant__ AddPartsArgs args) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= args.units * args.width) return;
  const float* from = args.sums + index / args.width * args.parts * args.width + index % args.width;
  float total = 0;
  for (int64_t part = 0; part < args.parts; ++part) total += from[part * args.width];
  stream_r1::cuda::store_value(args.out, index, total);
}

namespace stream_r1::cuda {

LaunchError launch_add_parts(const AddPartsArgs& args, Stream stream) {
  const int64_t elements = args.units * args.width;
  if (elements == 0) return nullptr;
  add_parts<<<blocks_for(elements, 256), 256, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
