#include "cpu/intra_weights_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/rows.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

// The sum in pieces: float32 in a piece, float64 over them.
double sum(const float* values, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += 1024) {
    const float* piece = values + start;
    total += sum_terms(std::min<int64_t>(1024, n - start), [piece](int64_t i) { return piece[i]; });
  }
  return total;
}

void scale(float* values, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
}

}  // namespace

void fuse_frames(const IntraWeightsArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.cells;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.frames;
    float* const weights = args.weights + unit * n;
    for (int64_t m = 0; m < args.axes; ++m) {
      const float* saliency = args.saliency + (m * args.batch * args.frames + unit) * n;
      const float share = args.shares[batch * args.axes + m];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) weights[i] = (m == 0 ? 0.f : weights[i]) + share * saliency[i];
    }
    args.frame_means[unit] = sum(weights, n) / static_cast<double>(n);
    float low = weights[0], high = weights[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < n; ++i) {
      low = std::min(low, weights[i]);
      high = std::max(high, weights[i]);
    }
    const float range = high - low;
    if (!args.use_spatial || range <= args.flat_range * std::abs(high)) {
      std::fill_n(weights, n, 1.f);
    } else {
      const float floor = args.spatial_floor, strength = args.spatial_strength, base = 1 - strength;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        weights[i] = std::max(floor, base + strength * ((weights[i] - low) / range));
      scale(weights, n, static_cast<float>(static_cast<double>(n) / sum(weights, n)));
    }
    args.map_sums[unit] = sum(weights, n);
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
