#include "cuda/qk_norm_rotary.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_NORM_ROTARY(suffix, T)                                                       \
  STREAM_R1_KERNEL(norm_rotary_##suffix, 256, 3, NormRotaryArgs, norm_rotary<T>)               \
  STREAM_R1_KERNEL(norm_rotary_grad_x_##suffix, 256, 3, NormRotaryArgs, norm_rotary_grad_x<T>) \
  STREAM_R1_KERNEL(norm_rotary_grad_weight_##suffix, 256, 3, NormRotaryArgs, norm_rotary_grad_weight<T>)

STREAM_R1_NORM_ROTARY(fp32, float)
STREAM_R1_NORM_ROTARY(bf16, Bf16)
STREAM_R1_NORM_ROTARY(fp16, Fp16)

LaunchError launch_norm_rotary(const NormRotaryArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows * args.heads * args.head_dim == 0) return nullptr;
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, norm_rotary);
  kernel<<<dim3(blocks_for(rows, kRotaryWarps), 2), kRotaryWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_norm_rotary_backward(const NormRotaryArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (args.heads * args.head_dim == 0) return nullptr;
  if (rows > 0) {
    const auto kernel = STREAM_R1_BY_ELEMENT(args.element, norm_rotary_grad_x);
    kernel<<<dim3(blocks_for(rows, kRotaryWarps), 2), kRotaryWarps * kWarp, 0, stream>>>(args);
  }
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, norm_rotary_grad_weight);
  const unsigned columns = blocks_for(int64_t(args.heads) * args.head_dim, kSumColumns);
  kernel<<<dim3(static_cast<unsigned>(args.parts), columns, 2), kSumThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
