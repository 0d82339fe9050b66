// x, or GELU(x), in FP8 with a scale a row. A warp has a row at a time; a lane packs of 8 numbers. The
// activation is computed once for the row's largest magnitude and once more to be rounded.

#pragma once

#include "cuda/fp8.cuh"
#include "cuda/quantize_rows.h"

namespace stream_r1::cuda {

constexpr int kQuantizeWarps = 8;  // rows of a block

// The tanh approximation, x / 2 (1 + tanh(u)) = x / (1 + e^-2u).
__device__ __forceinline__ float gelu(float x) {
  constexpr float kTwiceRoot = 1.59576912160573f;  // 2 sqrt(2 / pi)
  constexpr float kLog2e = 1.44269504088896f;
  const float twice_u = kTwiceRoot * (x + 0.044715f * x * x * x);
  return prim::divide(x, 1.f + prim::exp2(-kLog2e * twice_u));
}

__device__ __forceinline__ Pack activated(Pack x, bool with_gelu) {
  if (with_gelu) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) x.v[j] = gelu(x.v[j]);
  }
  return x;
}

template <class T, bool kWhole>
__device__ __forceinline__ void quantize_rows_of(const QuantizeRowsArgs& args) {
  const int width = args.width;
  const bool with_gelu = args.gelu != 0;
  for_rows<kQuantizeWarps>(args.batch * args.tokens, args.rows_a_warp, [&](int64_t index) {
    const LaneRow<T, kWhole> row(static_cast<const T*>(args.x) + index / args.tokens * args.x_batch +
                                     index % args.tokens * args.x_token,
                                 width);
    uint32_t largest = 0;
    row.walk([&](int, auto, const Pack& x) {
      const Pack y = activated(x, with_gelu);  // 0 past the row's end
#pragma unroll
      for (int j = 0; j < kPack; ++j) largest = larger_magnitude(largest, y.v[j]);
    });
    const RowScale to(largest);
    uint8_t* data = args.data + index * width;
    row.walk([&](int i, auto count, const Pack& x) {
      store_e4m3(data + i, count, activated(x, with_gelu), to.factor);
    });
    if (threadIdx.x % kWarp == 0) args.scale[index] = to.scale;
  });
}

template <class T>
__device__ __forceinline__ void quantize_rows(const QuantizeRowsArgs& args) {
  if (args.whole)
    quantize_rows_of<T, true>(args);
  else
    quantize_rows_of<T, false>(args);
}

}  // namespace stream_r1::cuda
