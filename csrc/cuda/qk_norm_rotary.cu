#include "cuda/qk_norm_rotary.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_NORM_ROTARY(suffix, T)                                                       \
  STREAM_R1_KERNEL(norm_rotary_##suffix, 256, kRowBlocks, NormRotaryArgs, norm_rotary<T>)      \
  STREAM_R1_KERNEL(norm_rotary_grad_x_##suffix, 256, 3, NormRotaryArgs, norm_rotary_grad_x<T>) \
  STREAM_R1_KERNEL(norm_rotary_grad_weight_##suffix, 256, 3, NormRotaryArgs, norm_rotary_grad_weight<T>)

STREAM_R1_NORM_ROTARY(fp32, float)
STREAM_R1_NORM_ROTARY(bf16, Bf16)
STREAM_R1_NORM_ROTARY(fp16, Fp16)

LaunchError launch_norm_rotary(NormRotaryArgs args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows * args.heads * args.head_dim == 0) return nullptr;
  RowGrid grid;
  if (const LaunchError error = row_grid(rows, kRotaryWarps, kRowBlocks, 2, grid)) return error;
  args.rows_a_warp = grid.rows_a_warp;
  args.whole = args.head_dim % kPack == 0 && rows_start_aligned(args.cos, Element::float32, {}) &&
               rows_start_aligned(args.sin, Element::float32, {});
  for (const NormRotarySide& side : args.sides)
    args.whole &= rows_start_aligned(side.x, args.element, {side.x_batch, side.x_token}) &&
                  rows_start_aligned(side.weight.data, side.weight.element, {}) &&
                  rows_start_aligned(side.y, args.element, {side.y_batch, side.y_token, side.y_head});
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, norm_rotary);
  kernel<<<dim3(grid.blocks, 2), kRotaryWarps * kWarp, 0, stream>>>(args);
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
