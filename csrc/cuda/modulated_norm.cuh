// LN(x) * (1 + scale) + shift with a shift and a scale per frame. A warp has a token at a time; a lane packs
// of 8 channels. The backward reads a row again where it needs it again: it is in the L1 cache by then.

#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/fp8.cuh"
#include "cuda/modulated_norm.h"
#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kNormWarps = 8;  // rows of a block

// Where a token lies.
template <class T>
struct NormRow {
  const T* x;
  int64_t shift, scale;  // offsets of its frame's

  __device__ NormRow(const ModulatedNormArgs& args, int64_t row) {
    const int64_t b = row / args.tokens, t = row % args.tokens, frame = t / (args.tokens / args.frames);
    x = static_cast<const T*>(args.x) + b * args.x_batch + t * args.x_token;
    shift = b * args.shift_batch + frame * args.shift_frame;
    scale = b * args.scale_batch + frame * args.scale_frame;
  }
};

// Mean and inverse deviation of a row.
struct Moments {
  float mean, rstd;

  template <class Row>
  __device__ __forceinline__ Moments(const Row& row, int width, float eps) {
    float sum = 0;
    row.walk([&](int, auto, const Pack& x) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) sum += x.v[j];
    });
    mean = warp_sum(sum) / width;
    float squares = 0;
    row.walk([&](int, auto count, const Pack& x) {
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (j < count) squares += (x.v[j] - mean) * (x.v[j] - mean);
    });
    rstd = prim::divide(1.f, prim::square_root(warp_sum(squares) / width + eps));
  }
};

// A pack of channels from i on; past the row's end it is anything.
template <class T, class Count>
__device__ __forceinline__ Pack modulated(const ModulatedNormArgs& args, const NormRow<T>& place, float mean,
                                          float rstd, int i, Count count, Pack x) {
  const Pack shift = load_pack(args.shift, place.shift + i, count),
             scale = load_pack(args.scale, place.scale + i, count);
#pragma unroll
  for (int j = 0; j < kPack; ++j) x.v[j] = (x.v[j] - mean) * rstd * (1 + scale.v[j]) + shift.v[j];
  return x;
}

template <class T, bool kWhole>
__device__ __forceinline__ void modulated_norm_rows(const ModulatedNormArgs& args) {
  const int width = args.width;
  for_rows<kNormWarps>(args.batch * args.tokens, args.rows_a_warp, [&](int64_t index) {
    const NormRow<T> place(args, index);
    const LaneRow<T, kWhole> row(place.x, width);
    const Moments of(row, width, args.eps);
    T* out = static_cast<T*>(args.out) + index * width;
    row.walk([&](int i, auto count, const Pack& x) {
      store_pack(out + i, count, modulated(args, place, of.mean, of.rstd, i, count, x));
    });
    if (threadIdx.x % kWarp == 0) {
      args.mean[index] = of.mean;
      args.rstd[index] = of.rstd;
    }
  });
}

template <class T>
__device__ __forceinline__ void modulated_norm(const ModulatedNormArgs& args) {
  if (args.whole)
    modulated_norm_rows<T, true>(args);
  else
    modulated_norm_rows<T, false>(args);
}

// The same, each row in FP8 with its scale: what would be written is computed twice, and never is.
template <class T, bool kWhole>
__device__ __forceinline__ void modulated_norm_fp8_rows(const ModulatedNormArgs& args) {
  const int width = args.width;
  for_rows<kNormWarps>(args.batch * args.tokens, args.rows_a_warp, [&](int64_t index) {
    const NormRow<T> place(args, index);
    const LaneRow<T, kWhole> row(place.x, width);
    const Moments of(row, width, args.eps);
    uint32_t largest = 0;
    row.walk([&](int i, auto count, const Pack& x) {
      const Pack y = modulated(args, place, of.mean, of.rstd, i, count, x);
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (j < count) largest = larger_magnitude(largest, y.v[j]);
    });
    const RowScale to(largest);
    uint8_t* out = static_cast<uint8_t*>(args.out) + index * width;
    row.walk([&](int i, auto count, const Pack& x) {
      store_e4m3(out + i, count, modulated(args, place, of.mean, of.rstd, i, count, x), to.factor);
    });
    if (threadIdx.x % kWarp == 0) args.row_scale[index] = to.scale;
  });
}

template <class T>
__device__ __forceinline__ void modulated_norm_fp8(const ModulatedNormArgs& args) {
  if (args.whole)
    modulated_norm_fp8_rows<T, true>(args);
  else
    modulated_norm_fp8_rows<T, false>(args);
}

// With n = (x - mean) * rstd and u = grad * (1 + scale): grad_x = rstd * (u - mean(u) - n * mean(u * n)).
template <class T>
__device__ __forceinline__ void modulated_norm_grad_x(const ModulatedNormArgs& args) {
  const int64_t index = int64_t(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (index >= args.batch * args.tokens) return;
  const NormRow<T> row(args, index);
  const int lane = threadIdx.x % kWarp, width = args.width;
  const T* grad_out = static_cast<const T*>(args.grad_out) + index * width;
  const float mean = args.mean[index], rstd = args.rstd[index];
  float u_sum = 0, un_sum = 0;
  for (int i = lane * kPack; i < width; i += kWarp * kPack) {
    const int count = least(width - i, kPack);
    const Pack x = load_pack(row.x + i, count), g = load_pack(grad_out + i, count),
               scale = load_pack(args.scale, row.scale + i, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {  // g is 0 past the row's end
      const float u = g.v[j] * (1 + scale.v[j]);
      u_sum += u;
      un_sum += u * ((x.v[j] - mean) * rstd);
    }
  }
  const float u_mean = warp_sum(u_sum) / width, un_mean = warp_sum(un_sum) / width;
  T* grad_x = static_cast<T*>(args.grad_x) + index * width;
  for (int i = lane * kPack; i < width; i += kWarp * kPack) {
    const int count = least(width - i, kPack);
    Pack x = load_pack(row.x + i, count);
    const Pack g = load_pack(grad_out + i, count), scale = load_pack(args.scale, row.scale + i, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      x.v[j] = rstd * (g.v[j] * (1 + scale.v[j]) - u_mean - (x.v[j] - mean) * rstd * un_mean);
    store_pack(grad_x + i, count, x);
  }
}

// Parts of grad_shift = sum of grad and grad_scale = sum of grad * n over a frame's tokens. Block (b, frame,
// part).
template <class T>
__device__ __forceinline__ void modulated_norm_grad_modulation(const ModulatedNormArgs& args) {
  const int64_t part = blockIdx.x % args.parts, frame = blockIdx.x / args.parts;  // frame of B * F
  const int64_t tokens = args.tokens / args.frames, begin = part * args.rows_a_part;
  const Stretch stretch{frame * tokens + begin,
                        frame * tokens + begin + least(tokens - begin, static_cast<int>(args.rows_a_part))};
  const auto term = [&](int64_t index, int64_t column, int count, Pack(&terms)[2]) {
    const NormRow<T> row(args, index);
    const float mean = args.mean[index], rstd = args.rstd[index];
    const Pack x = load_pack(row.x + column, count);
    terms[0] = load_pack(static_cast<const T*>(args.grad_out) + index * args.width + column, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) terms[1].v[j] = terms[0].v[j] * ((x.v[j] - mean) * rstd);
  };
  const int64_t offset = int64_t(blockIdx.x) * args.width;
  sum_columns<2>(stretch, args.width, term, {args.shift_sums + offset, args.scale_sums + offset});
}

}  // namespace stream_r1::cuda
