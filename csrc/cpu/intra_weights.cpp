
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/checks.h"
#include "cpu/intra_weights_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

constexpr float kFlatRange = 1e-6f;  // as in the reference

// One factor a frame, from the frame means of the fused saliency: min-max, blend, floor. The caller's
// division by the mean makes any constant profile ones.
std::vector<double> temporal_profile(const double* means, int64_t frames, double strength, double floor) {
  const auto [low, high] = std::minmax_element(means, means + frames);
  const double range = *high - *low;
  std::vector<double> profile(frames, 1.0);
  if (range <= kFlatRange * std::abs(*high)) return profile;
  for (int64_t f = 0; f < frames; ++f)
    profile[f] = std::max(floor, (1 - strength) + strength * (means[f] - *low) / range);
  return profile;
}

// softmax of -scores / temperature over the axes, [B, M].
std::vector<float> shares_of(const Tensor& scores, double temperature) {
  const int64_t batch = scores.size(0), axes = scores.size(1);
  const float* score = scores.const_data_ptr<float>();
  std::vector<float> shares(batch * axes);
  for (int64_t b = 0; b < batch; ++b, score += axes) {
    const double lowest = *std::min_element(score, score + axes);
    double total = 0;
    for (int64_t m = 0; m < axes; ++m) total += std::exp((lowest - score[m]) / temperature);
    for (int64_t m = 0; m < axes; ++m)
      shares[b * axes + m] = static_cast<float>(std::exp((lowest - score[m]) / temperature) / total);
  }
  return shares;
}

Tensor intra_weights_cpu(const Tensor& saliency_, const Tensor& scores, double temperature,
                         double spatial_floor, double temporal_floor, double spatial_strength,
                         double temporal_strength, bool use_spatial, bool use_temporal) {
  check_saliency(saliency_, scores);
  const int64_t axes = saliency_.size(0), batch = saliency_.size(1), frames = saliency_.size(2);
  const int64_t rows = saliency_.size(3), columns = saliency_.size(4), cells = rows * columns;
  const Tensor saliency = contiguous_float(saliency_);
  const std::vector<float> shares = shares_of(contiguous_float(scores), temperature);
  Tensor weights = allocate({batch, frames, 1, rows, columns}, saliency);
  std::vector<double> frame_means(batch * frames), map_means(batch * frames);
  const IntraWeightsArgs args{saliency.const_data_ptr<float>(),
                              shares.data(),
                              weights.mutable_data_ptr<float>(),
                              frame_means.data(),
                              map_means.data(),
                              axes,
                              batch,
                              frames,
                              cells,
                              static_cast<float>(spatial_floor),
                              static_cast<float>(spatial_strength),
                              use_spatial,
                              kFlatRange};
  parallel_for(0, batch * frames, grain(cells * (axes + 3)),
               [&, kernel = pick_fuse_frames()](int64_t begin, int64_t end) { kernel(args, begin, end); });

  // The maps have no common mean yet: a frame's factor is its profile over its map's mean, over the mean of
  // all.
  std::vector<float> factors(batch * frames);
  for (int64_t b = 0; b < batch; ++b) {
    const double* means = frame_means.data() + b * frames;
    std::vector<double> profile(frames, 1.0);
    if (use_temporal) profile = temporal_profile(means, frames, temporal_strength, temporal_floor);
    const double total = std::accumulate(profile.begin(), profile.end(), 0.0);
    const bool finite = std::isfinite(std::accumulate(means, means + frames, 0.0));
    for (int64_t f = 0; f < frames; ++f)
      factors[b * frames + f] =
          finite ? static_cast<float>(profile[f] * frames / total / map_means[b * frames + f])
                 : std::numeric_limits<float>::quiet_NaN();
  }
  parallel_for(0, batch * frames, grain(cells),
               [&, data = weights.mutable_data_ptr<float>(), kernel = pick_scale_frames()](
                   int64_t begin, int64_t end) { kernel(data, factors.data(), cells, begin, end); });
  return weights;
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) { m.impl("intra_weights", TORCH_BOX(&stream_r1::intra_weights_cpu)); }
