// RMSNorm over the full width, head split and rotary of q and k. A warp has a row (b, t) of q (blockIdx.y =
// 0) or k (1) at a time; a lane has packs of 8 channels, which are 4 pairs. The backward reads a row again
// where it needs it again: it is in the L1 cache by then.

#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/qk_norm_rotary.h"
#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kRotaryWarps = 8;  // rows of a block

// Channels [i, i + count) of a row of heads: one piece of memory if packs don't cross heads, else pair by
// pair.
template <class T>
__device__ __forceinline__ Pack load_heads(const T* row, int64_t head_stride, int head_dim, int i,
                                           int count) {
  if (head_dim % kPack == 0) return load_pack(row + i / head_dim * head_stride + i % head_dim, count);
  Pack pack{};
#pragma unroll
  for (int j = 0; j < kPack; j += 2) {
    if (j >= count) break;
    const T* pair = row + (i + j) / head_dim * head_stride + (i + j) % head_dim;
    pack.v[j] = to_float(pair[0]);
    pack.v[j + 1] = to_float(pair[1]);
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_heads(T* row, int64_t head_stride, int head_dim, int i, WholePack count,
                                            const Pack& pack) {
  store_pack(row + i / head_dim * head_stride + i % head_dim, count, pack);
}

template <class T>
__device__ __forceinline__ void store_heads(T* row, int64_t head_stride, int head_dim, int i, int count,
                                            const Pack& pack) {
  if (head_dim % kPack == 0) {
    store_pack(row + i / head_dim * head_stride + i % head_dim, count, pack);
    return;
  }
#pragma unroll
  for (int j = 0; j < kPack; j += 2) {
    if (j >= count) break;
    T* pair = row + (i + j) / head_dim * head_stride + (i + j) % head_dim;
    pair[0] = from_float<T>(pack.v[j]);
    pair[1] = from_float<T>(pack.v[j + 1]);
  }
}

// cos or sin [D / 2] of the pairs in channels [i, i + count).
struct Phases {
  float v[kPack / 2];
};

__device__ __forceinline__ Phases load_phases(const float* row, int head_dim, int i, WholePack) {
  const uint4 four = prim::load16_unchanging(row + i % head_dim / 2);
  return {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)};
}

__device__ __forceinline__ Phases load_phases(const float* row, int head_dim, int i, int count) {
  Phases phases{};
  if (head_dim % kPack == 0 && is_aligned(row + i % head_dim / 2)) {
    phases = load_phases(row, head_dim, i, WholePack{});
  } else {
#pragma unroll
    for (int j = 0; j < kPack / 2; ++j)
      if (2 * j < count) phases.v[j] = row[(i + 2 * j) % head_dim / 2];
  }
  return phases;
}

// Pairs (a, b) -> (a cos - b sin, a sin + b cos); with -sin, back again.
__device__ __forceinline__ Pack rotate(const Pack& x, const Phases& cos, const Phases& sin, float sign) {
  Pack y;
#pragma unroll
  for (int j = 0; j < kPack / 2; ++j) {
    const float even = x.v[2 * j], odd = x.v[2 * j + 1], s = sign * sin.v[j];
    y.v[2 * j] = even * cos.v[j] - odd * s;
    y.v[2 * j + 1] = even * s + odd * cos.v[j];
  }
  return y;
}

// Where the row of this warp lies.
template <class T>
struct RotaryRow {
  int64_t row, t;
  const T* x;
  T* y;

  __device__ RotaryRow(const NormRotaryArgs& args, const NormRotarySide& side, int64_t row_)
      : row(row_), t(row_ % args.tokens) {
    const int64_t b = row / args.tokens;
    x = static_cast<const T*>(side.x) + b * side.x_batch + t * side.x_token;
    y = static_cast<T*>(side.y) + b * side.y_batch + t * side.y_token;
  }

  // The gradient by the normed and weighted row: y's gradient, rotated back.
  __device__ Pack unrotated(const NormRotaryArgs& args, int64_t y_head, int i, int count) const {
    const Phases cos = load_phases(args.cos + t * (args.head_dim / 2), args.head_dim, i, count),
                 sin = load_phases(args.sin + t * (args.head_dim / 2), args.head_dim, i, count);
    return rotate(load_heads(y, y_head, args.head_dim, i, count), cos, sin, -1.f);
  }
};

template <class T, bool kWhole>
__device__ __forceinline__ float inverse_rms(const LaneRow<T, kWhole>& row, int width, float eps) {
  float squares = 0;
  row.walk([&](int, auto, const Pack& p) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) squares += p.v[j] * p.v[j];
  });
  return prim::divide(1.f, prim::square_root(warp_sum(squares) / width + eps));
}

template <class T, bool kWhole>
__device__ __forceinline__ void norm_rotary_rows(const NormRotaryArgs& args) {
  const NormRotarySide& side = args.sides[blockIdx.y];
  const int width = args.heads * args.head_dim;
  for_rows<kRotaryWarps>(args.batch * args.tokens, args.rows_a_warp, [&](int64_t index) {
    const RotaryRow<T> place(args, side, index);
    const LaneRow<T, kWhole> row(place.x, width);
    const float scale = inverse_rms(row, width, args.eps);
    const float *cos_row = args.cos + place.t * (args.head_dim / 2),
                *sin_row = args.sin + place.t * (args.head_dim / 2);
    row.walk([&](int i, auto count, Pack p) {
      const Pack weight = load_pack(side.weight, i, count);
#pragma unroll
      for (int j = 0; j < kPack; ++j) p.v[j] *= scale * weight.v[j];
      const Phases cos = load_phases(cos_row, args.head_dim, i, count),
                   sin = load_phases(sin_row, args.head_dim, i, count);
      store_heads(place.y, side.y_head, args.head_dim, i, count, rotate(p, cos, sin, 1.f));
    });
  });
}

template <class T>
__device__ __forceinline__ void norm_rotary(const NormRotaryArgs& args) {
  if (args.whole)
    norm_rotary_rows<T, true>(args);
  else
    norm_rotary_rows<T, false>(args);
}

// y = R (n * w), n = x * s, s = (mean x^2 + eps)^-1/2. With g = R^T grad_y:
// grad_x = s * (g * w - n * mean(g * w * n)).
template <class T>
__device__ __forceinline__ void norm_rotary_grad_x(const NormRotaryArgs& args) {
  const NormRotarySide& side = args.sides[blockIdx.y];
  const int64_t index = int64_t(blockIdx.x) * kRotaryWarps + threadIdx.x / kWarp;
  if (index >= args.batch * args.tokens) return;
  const RotaryRow<T> row(args, side, index);
  const int width = args.heads * args.head_dim, lane = threadIdx.x % kWarp;
  const float s = inverse_rms(LaneRow<T, false>(row.x, width), width, args.eps);
  if (lane == 0) side.inverse_rms[index] = s;
  float product = 0;
  for (int i = lane * kPack; i < width; i += kWarp * kPack) {
    const int count = least(width - i, kPack);
    const Pack x = load_pack(row.x + i, count), w = load_pack(side.weight, i, count),
               g = row.unrotated(args, side.y_head, i, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) product += g.v[j] * w.v[j] * (x.v[j] * s);
  }
  const float mean = warp_sum(product) / width;
  T* grad_x = static_cast<T*>(side.grad_x) + index * width;
  for (int i = lane * kPack; i < width; i += kWarp * kPack) {
    const int count = least(width - i, kPack);
    const Pack x = load_pack(row.x + i, count), w = load_pack(side.weight, i, count),
               g = row.unrotated(args, side.y_head, i, count);
    Pack result;
#pragma unroll
    for (int j = 0; j < kPack; ++j) result.v[j] = s * (g.v[j] * w.v[j] - x.v[j] * s * mean);
    store_pack(grad_x + i, count, result);
  }
}

// Parts of grad_w = sum over rows of g * n. Block (part, columns, side).
template <class T>
__device__ __forceinline__ void norm_rotary_grad_weight(const NormRotaryArgs& args) {
  const NormRotarySide& side = args.sides[blockIdx.z];
  const int width = args.heads * args.head_dim;
  const int64_t begin = blockIdx.x * args.rows_a_part, rows = args.batch * args.tokens;
  const Stretch stretch{begin, begin + least(rows - begin, static_cast<int>(args.rows_a_part))};
  const auto term = [&](int64_t index, int64_t column, int count, Pack(&terms)[1]) {
    const RotaryRow<T> row(args, side, index);
    const float s = side.inverse_rms[index];
    const Pack x = load_pack(row.x + column, count),
               g = row.unrotated(args, side.y_head, static_cast<int>(column), count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) terms[0].v[j] = g.v[j] * (x.v[j] * s);
  };
  sum_columns<1>(stretch, width, term, {side.weight_sums + int64_t(blockIdx.x) * width});
}

}  // namespace stream_r1::cuda
