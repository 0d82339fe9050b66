// From pixel gradients to the weights of the latent cells, on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct RegionSaliencyArgs {
  const void* grads;  // [M, B, T, C, H, W], rows of W without gaps
  int64_t axis_stride, batch_stride, frame_stride, channel_stride, row_stride;
  float* out;  // [M, B, F, h, w] contiguous
  int64_t axes, batch, pixel_frames, channels, height, width;
  int64_t frames, rows, columns;  // F, h, w
  Element element;
};

// Widest picture: the sums of a row of pixels have to fit the shared memory of every GPU.
constexpr int64_t kMostPixels = 12288;

LaunchError launch_region_saliency(const RegionSaliencyArgs& args, Stream stream);

struct IntraWeightsArgs {
  const float* saliency;  // [M, B, F, h * w] contiguous
  const float* scores;    // [B, M] contiguous
  float* weights;         // [B, F, h * w]
  float* frame_means;     // [B, F], of the fused saliency
  float* map_sums;        // [B, F], of the spatial map before it is divided by its mean
  int64_t axes, batch, frames, cells;
  float temperature, spatial_floor, temporal_floor, spatial_strength, temporal_strength;
  bool use_spatial, use_temporal;
};

LaunchError launch_intra_weights(const IntraWeightsArgs& args, Stream stream);

}  // namespace stream_r1::cuda
