#include "cuda/modulated_norm.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

constexpr int kFp8Blocks = 2;  // that fit a processor, of modulated_norm_fp8: it takes more registers

#define STREAM_R1_MODULATED_NORM(suffix, T)                                                                \
  STREAM_R1_KERNEL(modulated_norm_##suffix, 256, kRowBlocks, ModulatedNormArgs, modulated_norm<T>)         \
  STREAM_R1_KERNEL(modulated_norm_fp8_##suffix, 256, kFp8Blocks, ModulatedNormArgs, modulated_norm_fp8<T>) \
  STREAM_R1_KERNEL(modulated_norm_grad_x_##suffix, 256, 3, ModulatedNormArgs, modulated_norm_grad_x<T>)    \
  STREAM_R1_KERNEL(modulated_norm_grad_modulation_##suffix, 256, 3, ModulatedNormArgs,                     \
                   modulated_norm_grad_modulation<T>)

STREAM_R1_MODULATED_NORM(fp32, float)
STREAM_R1_MODULATED_NORM(bf16, Bf16)
STREAM_R1_MODULATED_NORM(fp16, Fp16)

namespace {

// Of a launch with rows, in blocks of which `fitting` fit a processor.
LaunchError set_rows(ModulatedNormArgs& args, int fitting, RowGrid& grid) {
  if (const LaunchError error = row_grid(args.batch * args.tokens, kNormWarps, fitting, 1, grid))
    return error;
  args.rows_a_warp = grid.rows_a_warp;
  args.whole =
      args.width % kPack == 0 && rows_start_aligned(args.x, args.element, {args.x_batch, args.x_token}) &&
      rows_start_aligned(args.shift.data, args.shift.element, {args.shift_batch, args.shift_frame}) &&
      rows_start_aligned(args.scale.data, args.scale.element, {args.scale_batch, args.scale_frame}) &&
      rows_start_aligned(args.out, args.element, {args.width});  // bytes in FP8: they ask for less
  return nullptr;
}

}  // namespace

LaunchError launch_modulated_norm(ModulatedNormArgs args, Stream stream) {
  if (args.batch * args.tokens == 0 || args.width == 0) return nullptr;
  RowGrid grid;
  if (const LaunchError error = set_rows(args, kRowBlocks, grid)) return error;
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, modulated_norm);
  kernel<<<grid.blocks, kNormWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_modulated_norm_fp8(ModulatedNormArgs args, Stream stream) {
  if (args.batch * args.tokens == 0 || args.width == 0) return nullptr;
  RowGrid grid;
  if (const LaunchError error = set_rows(args, kFp8Blocks, grid)) return error;
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, modulated_norm_fp8);
  kernel<<<grid.blocks, kNormWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

LaunchError launch_modulated_norm_backward(const ModulatedNormArgs& args, Stream stream) {
  const int64_t rows = args.batch * args.tokens, units = args.batch * args.frames;
  if (units == 0 || args.width == 0) return nullptr;
  if (rows > 0) {
    const auto kernel = STREAM_R1_BY_ELEMENT(args.element, modulated_norm_grad_x);
    kernel<<<blocks_for(rows, kNormWarps), kNormWarps * kWarp, 0, stream>>>(args);
  }
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, modulated_norm_grad_modulation);
  const dim3 grid(static_cast<unsigned>(units * args.parts), blocks_for(args.width, kSumColumns));
  kernel<<<grid, kSumThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
