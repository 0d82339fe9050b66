#include "cuda/quantize_rows.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_QUANTIZE_ROWS(suffix, T) \
  STREAM_R1_KERNEL(quantize_rows_##suffix, 256, kRowBlocks, QuantizeRowsArgs, quantize_rows<T>)

STREAM_R1_QUANTIZE_ROWS(fp32, float)
STREAM_R1_QUANTIZE_ROWS(bf16, Bf16)
STREAM_R1_QUANTIZE_ROWS(fp16, Fp16)

LaunchError launch_quantize_rows(QuantizeRowsArgs args, Stream stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0) return nullptr;
  RowGrid grid;
  if (const LaunchError error = row_grid(rows, kQuantizeWarps, kRowBlocks, 1, grid)) return error;
  args.rows_a_warp = grid.rows_a_warp;
  args.whole =
      args.width % kPack == 0 && rows_start_aligned(args.x, args.element, {args.x_batch, args.x_token});
  const auto kernel = STREAM_R1_BY_ELEMENT(args.element, quantize_rows);
  kernel<<<grid.blocks, kQuantizeWarps * kWarp, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
