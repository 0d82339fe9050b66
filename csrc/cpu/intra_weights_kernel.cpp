#include "cpu/intra_weights_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr int64_t kPiece = 1024;  // elements of a float32 sum; the sums of pieces are float64

Vec min(Vec a, Vec b) { return a < b ? a : b; }

struct Fused {
  double sum = 0;
  float low, high;
};

// Writes the weighted sum of the axes' maps of a frame.
Fused fuse(const IntraWeightsArgs& args, const float* maps, const float* shares, float* fused) {
  const int64_t n = args.cells, axis_stride = args.batch * args.frames * n;
  Vec low = splat(INFINITY), high = -low;
  Fused result;
  for (int64_t start = 0; start < n; start += kPiece) {
    Vec sums = {};
    for_each_vector(std::min(kPiece, n - start), [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      Vec v = {};
      for (int64_t m = 0; m < args.axes; ++m)
        v += shares[m] * load(maps + m * axis_stride + start + i, lanes);
      store(fused + start + i, v, lanes);
      sums += v;
      low = min(keep(v, lanes, low), low);
      high = max(keep(v, lanes, high), high);
    });
    result.sum += sum(sums);
  }
  result.low = -max(-low);
  result.high = max(high);
  return result;
}

// Writes max(floor, 1 - strength + strength * (value - low) / range); returns the sum of it.
double spread(const IntraWeightsArgs& args, float low, float range, float* values) {
  // A range near the end of float32 has no reciprocal: it is taken times a power of two first.
  const float unit = range < 1e-30f ? 0x1p64f : 1.f;
  const float scale = args.spatial_strength / (range * unit), base = 1 - args.spatial_strength;
  const Vec floor = splat(args.spatial_floor);
  double total = 0;
  for (int64_t start = 0; start < args.cells; start += kPiece) {
    Vec sums = {};
    for_each_vector(std::min(kPiece, args.cells - start), [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      float* at = values + start + i;
      const Vec v = max(floor, base + scale * (unit * (load(at, lanes) - low)));
      store(at, v, lanes);
      sums += keep(v, lanes, Vec{});
    });
    total += sum(sums);
  }
  return total;
}

}  // namespace

void fuse_frames(const IntraWeightsArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.cells;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* const weights = args.weights + unit * n;
    const Fused fused =
        fuse(args, args.saliency + unit * n, args.shares + unit / args.frames * args.axes, weights);
    args.frame_means[unit] = fused.sum / static_cast<double>(n);
    const float range = fused.high - fused.low;
    if (!args.use_spatial || range <= args.flat_range * std::abs(fused.high)) {
      std::fill_n(weights, n, 1.f);
      args.map_means[unit] = 1;
    } else {
      args.map_means[unit] = spread(args, fused.low, range, weights) / static_cast<double>(n);
    }
  }
}

void scale_frames(float* weights, const float* factors, int64_t cells, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    for_each_vector(cells, [&, at = weights + unit * cells, factor = factors[unit]](int64_t i, auto lanes)
                               STREAM_R1_INLINE { store(at + i, factor * load(at + i, lanes), lanes); });
}

}  // namespace stream_r1::STREAM_R1_ISA
