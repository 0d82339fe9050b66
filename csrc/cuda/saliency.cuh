// Saliency of latent cells, and their weights in the loss.

#pragma once

#include <type_traits>

#include "cuda/rows.cuh"
#include "cuda/saliency.h"

namespace stream_r1::cuda {

constexpr int kBandThreads = 128;
constexpr int kMapWarps = 8, kMapThreads = kMapWarps * kWarp;
constexpr float kFlatRange = 1e-6f;  // a range below this fraction of the maximum is constant

// The norms over the channels of the pixels at `line`. Squares that leave the range of float32 are made again
// of values over the pixel's largest; those of float16 never do.
template <class T>
__device__ __forceinline__ Pack channel_norms(const RegionSaliencyArgs& args, const T* line, int count) {
  Pack norms{};
  for (int64_t c = 0; c < args.channels; ++c) {
    const Pack g = load_pack(line + c * args.channel_stride, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) norms.v[j] += g.v[j] * g.v[j];
  }
  bool tame = true;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if (j < count) tame &= norms.v[j] >= 1e-30f && norms.v[j] <= 1e37f;
    norms.v[j] = prim::square_root(norms.v[j]);
  }
  if (std::is_same_v<T, Fp16> || tame) return norms;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    float largest = 0, squares = 0;
    for (int64_t c = 0; c < args.channels; ++c)
      largest = fmaxf(largest, fabsf(to_float(line[c * args.channel_stride + j])));
    const float unit = largest > 0 && largest < infinity() ? largest : 1.f;
    for (int64_t c = 0; c < args.channels; ++c) {
      const float g = prim::divide(to_float(line[c * args.channel_stride + j]), unit);
      squares += g * g;
    }
    const float norm = prim::square_root(squares) * unit;
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i == j) norms.v[i] = norm;  // an index that is not known would put the pack into memory
  }
  return norms;
}

// One row of latent cells a block: the norms of its pixels are summed down each pixel column into shared
// memory
// (`width` floats), then over the columns of a cell.
template <class T>
__device__ __forceinline__ void region_saliency(const RegionSaliencyArgs& args) {
  extern __shared__ float column_sums[];
  const int64_t band = blockIdx.x, row = band % args.rows, frame = band / args.rows % args.frames,
                sample = band / args.rows / args.frames;
  // Latent frame 0 is pixel frame 0; each later one has `factor` pixel frames of its own.
  const int64_t factor = args.frames == 1 ? 0 : (args.pixel_frames - 1) / (args.frames - 1);
  const int64_t first = frame == 0 ? 0 : 1 + factor * (frame - 1), pixel_frames = frame == 0 ? 1 : factor;
  const int64_t cell_height = args.height / args.rows, cell_width = args.width / args.columns;
  const T* corner = static_cast<const T*>(args.grads) + sample / args.batch * args.axis_stride +
                    sample % args.batch * args.batch_stride + first * args.frame_stride +
                    row * cell_height * args.row_stride;

  const float share = prim::divide(1.f, static_cast<float>(pixel_frames * cell_height * cell_width));
  for (int64_t i = threadIdx.x * kPack; i < args.width; i += kBandThreads * kPack) {
    const int count = least(args.width - i, kPack);
    Pack sums{};
    for (int64_t f = 0; f < pixel_frames; ++f)
      for (int64_t y = 0; y < cell_height; ++y) {
        const Pack norms =
            channel_norms(args, corner + f * args.frame_stride + y * args.row_stride + i, count);
#pragma unroll
        for (int j = 0; j < kPack; ++j) sums.v[j] += share * norms.v[j];
      }
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (j < count) column_sums[i + j] = sums.v[j];
  }
  __syncthreads();  // all columns are there
  for (int64_t column = threadIdx.x; column < args.columns; column += kBandThreads) {
    float total = 0;
    for (int64_t i = 0; i < cell_width; ++i) total += column_sums[column * cell_width + i];
    args.out[band * args.columns + column] = total;
  }
}

// softmax(-scores / temperature) of one axis.
__device__ __forceinline__ float share_of_axis(const IntraWeightsArgs& args, const float* scores,
                                               int64_t axis) {
  float lowest = infinity(), total = 0;
  for (int64_t m = 0; m < args.axes; ++m) lowest = fminf(lowest, scores[m]);
  const auto weight = [&](int64_t m) {
    return prim::exp2(prim::divide(lowest - scores[m], args.temperature) * 1.4426950408889634f);
  };
  for (int64_t m = 0; m < args.axes; ++m) total += weight(m);
  return prim::divide(weight(axis), total);
}

// One frame (b, f) a block: the axes are fused, and `weights` becomes the spatial map, not yet divided by its
// mean.
__device__ __forceinline__ void fuse_frame(const IntraWeightsArgs& args) {
  const int64_t unit = blockIdx.x, b = unit / args.frames, n = args.cells;
  float* const weights = args.weights + unit * n;
  float sum = 0, low = infinity(), high = -infinity();
  // A thread reads only what it wrote itself: no barrier between the loops over cells.
  for (int64_t m = 0; m < args.axes; ++m) {
    const float share = share_of_axis(args, args.scores + b * args.axes, m);
    const float* saliency = args.saliency + (m * args.batch * args.frames + unit) * n;
    for (int64_t i = threadIdx.x * kPack; i < n; i += kMapThreads * kPack) {
      const int count = least(n - i, kPack);
      Pack fused = m == 0 ? Pack{} : load_pack<Memory::own>(weights + i, count);
      const Pack s = load_pack(saliency + i, count);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        fused.v[j] += share * s.v[j];
        if (m + 1 < args.axes || j >= count) continue;
        sum += fused.v[j];
        low = fminf(low, fused.v[j]);
        high = fmaxf(high, fused.v[j]);
      }
      store_pack(weights + i, count, fused);
    }
  }
  sum = block_sum<kMapWarps>(sum);
  low = block_reduce<kMapWarps>(low, infinity(), [](float a, float b) { return fminf(a, b); });
  high = block_reduce<kMapWarps>(high, -infinity(), [](float a, float b) { return fmaxf(a, b); });
  const float range = high - low;
  const bool flat = !args.use_spatial || range <= kFlatRange * fabsf(high);
  float map_sum = 0;
  for (int64_t i = threadIdx.x * kPack; i < n; i += kMapThreads * kPack) {
    const int count = least(n - i, kPack);
    Pack map = load_pack<Memory::own>(weights + i, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float blended =
          1 - args.spatial_strength + args.spatial_strength * prim::divide(map.v[j] - low, range);
      map.v[j] = flat ? 1.f : fmaxf(args.spatial_floor, blended);
      if (j < count) map_sum += map.v[j];
    }
    store_pack(weights + i, count, map);
  }
  map_sum = block_sum<kMapWarps>(map_sum);
  if (threadIdx.x != 0) return;
  args.frame_means[unit] = prim::divide(sum, static_cast<float>(n));
  args.map_sums[unit] = map_sum;
}

// The temporal profile before it is divided by its mean: min-max over frames, blended, with a floor.
struct Profile {
  const IntraWeightsArgs& args;
  const float* means;  // [F]
  float low = infinity(), high = -infinity();
  bool finite;

  __device__ Profile(const IntraWeightsArgs& args_, int64_t b)
      : args(args_), means(args_.frame_means + b * args_.frames) {
    float total = 0;
    for (int64_t f = 0; f < args.frames; ++f) {
      low = fminf(low, means[f]);
      high = fmaxf(high, means[f]);
      total += means[f];
    }
    finite = fabsf(total) < infinity();
  }

  __device__ float at(int64_t f) const {
    const float range = high - low;
    if (!args.use_temporal || range <= kFlatRange * fabsf(high)) return 1.f;
    const float p = prim::divide(means[f] - low, range);
    return fmaxf(args.temporal_floor, 1 - args.temporal_strength + args.temporal_strength * p);
  }
};

// One frame (b, f) a block: map times profile, each divided by its mean; NaN where the saliency is not
// finite.
__device__ __forceinline__ void weigh_frame(const IntraWeightsArgs& args) {
  const int64_t unit = blockIdx.x, b = unit / args.frames, n = args.cells;
  const Profile profile(args, b);
  float total = 0;
  for (int64_t f = 0; f < args.frames; ++f) total += profile.at(f);
  float factor = prim::divide(profile.at(unit % args.frames) * static_cast<float>(args.frames), total);
  factor = prim::divide(factor * static_cast<float>(n), args.map_sums[unit]);
  if (!profile.finite) factor = infinity() - infinity();
  float* const weights = args.weights + unit * n;
  for (int64_t i = threadIdx.x * kPack; i < n; i += kMapThreads * kPack) {
    const int count = least(n - i, kPack);
    Pack map = load_pack<Memory::own>(weights + i, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) map.v[j] *= factor;
    store_pack(weights + i, count, map);
  }
}

}  // namespace stream_r1::cuda
