#include "cuda/gated_add.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_GATED_ADD(suffix, X, Y)                                              \
  STREAM_R1_KERNEL(gated_add_##suffix, 256, kRowBlocks, GatedAddArgs, gated_add<X, Y>) \
  STREAM_R1_KERNEL(gated_add_backward_##suffix, 256, 3, GatedAddArgs, gated_add_backward<X, Y>)

STREAM_R1_GATED_ADD(fp32, float, float)
STREAM_R1_GATED_ADD(bf16, Bf16, Bf16)
STREAM_R1_GATED_ADD(fp16, Fp16, Fp16)
STREAM_R1_GATED_ADD(fp32_bf16, float, Bf16)
STREAM_R1_GATED_ADD(fp32_fp16, float, Fp16)

namespace {

auto* pick(const GatedAddArgs& args, bool backward) {
  if (args.x_element == args.y_element)
    return backward ? STREAM_R1_BY_ELEMENT(args.x_element, gated_add_backward)
                    : STREAM_R1_BY_ELEMENT(args.x_element, gated_add);
  if (args.y_element == Element::bfloat16)
    return backward ? gated_add_backward_fp32_bf16 : gated_add_fp32_bf16;
  return backward ? gated_add_backward_fp32_fp16 : gated_add_fp32_fp16;
}

}  // namespace

LaunchError launch_gated_add(GatedAddArgs args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0 || args.width == 0) return nullptr;
  RowGrid grid;
  if (const LaunchError error = row_grid(rows, kGateWarps, kRowBlocks, 1, grid)) return error;
  args.rows_a_warp = grid.rows_a_warp;
  args.whole = args.width % kPack == 0 &&
               rows_start_aligned(args.x, args.x_element, {args.x_batch, args.x_token}) &&
               rows_start_aligned(args.y, args.y_element, {args.y_batch, args.y_token}) &&
               rows_start_aligned(args.gate.data, args.gate.element, {args.gate_batch, args.gate_frame}) &&
               rows_start_aligned(args.out, args.x_element, {args.width});
  pick(args, false)<<<grid.blocks, kGateWarps * kWarp, 0, stream>>>(args);
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
