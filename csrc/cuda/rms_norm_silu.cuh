// [before | silu(RMSNorm(x) * weight)], or RMSNorm(x) * weight alone. A group of lanes, a warp or a part of
// one, has a row of the result: an autoencoder's rows are short, and a warp with one of 96 channels would
// have most of its lanes idle. A lane has packs of 8 channels.

#pragma once

#include "cuda/rms_norm_silu.h"
#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kSiluThreads = 256;

template <class T, bool kSilu, bool kWhole>
__device__ __forceinline__ void rms_norm_rows(const RmsNormSiluArgs& args) {
  const int lanes = static_cast<int>(args.lanes), lane = threadIdx.x % lanes, width = args.width;
  const int64_t own = int64_t(blockIdx.x) * (kSiluThreads / lanes) + threadIdx.x / lanes;
  const int64_t rows = args.leading + args.tokens, all = args.batch * rows;
  const bool there = own < all;
  const int64_t index =
      there ? own : all - 1;  // groups without a row take part, as exchanges are of whole warps
  const int64_t b = index / rows, t = index % rows - args.leading;
  const bool copied = t < 0;
  const T* from = copied ? static_cast<const T*>(args.before) + b * args.before_batch +
                               (t + args.leading) * args.before_token
                         : static_cast<const T*>(args.x) + b * args.x_batch + t * args.x_token;
  // an autoencoder's rows of up to 512 channels, a transformer's of up to 1536
  const LaneRow<T, kWhole, kWhole ? (kSilu ? 4 : 12) / sizeof(T) : 0> row(from, width, lane, lanes);
  float squares = 0;
  row.walk([&](int, auto, const Pack& x) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) squares += x.v[j] * x.v[j];
  });
  for (int mask = lanes / 2; mask > 0; mask /= 2) squares += prim::exchange(squares, mask);
  if (!there) return;
  const float scale = prim::divide(1.f, prim::square_root(squares / width + args.eps));
  T* out = static_cast<T*>(args.out) + index * width;
  row.walk([&](int i, auto count, Pack x) {
    if (!copied) {
      const Pack weight = load_pack(args.weight, i, count);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float y = x.v[j] * scale * weight.v[j];
        x.v[j] = kSilu ? prim::divide(y, 1 + prim::exp2(-1.4426950f * y)) : y;
      }
    }
    store_pack(out + i, count, x);
  });
}

template <class T, bool kSilu>
__device__ __forceinline__ void rms_norm_silu(const RmsNormSiluArgs& args) {
  if (args.whole)
    rms_norm_rows<T, kSilu, true>(args);
  else
    rms_norm_rows<T, kSilu, false>(args);
}

}  // namespace stream_r1::cuda
