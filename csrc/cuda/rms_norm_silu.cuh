// [before | silu(RMSNorm(x) * weight)]. A group of lanes, a warp or a part of one, has a row of the result:
// an autoencoder's rows are short, and a warp with one of 96 channels would have most of its lanes idle. A
// lane has packs of 8 channels; a row is read again where it is needed again: it is in the L1 cache by then.

#pragma once

#include "cuda/rms_norm_silu.h"
#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kSiluThreads = 256;

template <class T>
__device__ __forceinline__ void rms_norm_silu(const RmsNormSiluArgs& args) {
  const int lanes = static_cast<int>(args.lanes), lane = threadIdx.x % lanes, width = args.width;
  const int64_t index = int64_t(blockIdx.x) * (kSiluThreads / lanes) + threadIdx.x / lanes;
  const int64_t rows = args.leading + args.tokens, b = index / rows, t = index % rows - args.leading;
  const bool there = b < args.batch, copied = t < 0;
  const T* row = copied ? static_cast<const T*>(args.before) + b * args.before_batch +
                              (t + args.leading) * args.before_token
                        : static_cast<const T*>(args.x) + b * args.x_batch + t * args.x_token;
  float squares = 0;
  if (there && !copied)
    for (int i = lane * kPack; i < width; i += lanes * kPack) {
      const Pack x = load_pack(row + i, least(width - i, kPack));
#pragma unroll
      for (int j = 0; j < kPack; ++j) squares += x.v[j] * x.v[j];
    }
  // groups without a row take part: the exchange is of the whole warp
  for (int mask = lanes / 2; mask > 0; mask /= 2) squares += prim::exchange(squares, mask);
  if (!there) return;
  const float scale = prim::divide(1.f, prim::square_root(squares / width + args.eps));
  T* out = static_cast<T*>(args.out) + index * width;
  for (int i = lane * kPack; i < width; i += lanes * kPack) {
    const int count = least(width - i, kPack);
    Pack x = load_pack(row + i, count);
    if (!copied) {
      const Pack weight = load_pack(args.weight, i, count);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float y = x.v[j] * scale * weight.v[j];
        x.v[j] = prim::divide(y, 1 + prim::exp2(-1.4426950f * y));
      }
    }
    store_pack(out + i, count, x);
  }
}

}  // namespace stream_r1::cuda
