#pragma once

#include "cpu/isa.h"

namespace stream_r1 {

struct IntraWeightsArgs {
  const float* saliency;  // [M, B, F, h * w] contiguous
  const float* shares;    // [B, M], of the axes in the fused saliency
  float* weights;         // [B, F, h * w]
  double* frame_means;    // [B, F], of the fused saliency
  double* map_means;      // [B, F], of what fuse_frames leaves in `weights`
  int64_t axes, batch, frames, cells;
  float spatial_floor, spatial_strength;
  bool use_spatial;
  float flat_range;  // a range below this fraction of the maximum is constant
};

// Frames begin .. end of the B * F frames: `weights` becomes the spatial map, or ones.
STREAM_R1_KERNEL(fuse_frames, void(const IntraWeightsArgs& args, int64_t begin, int64_t end));

// Frames begin .. end: weights [B * F, cells] times factors [B * F].
STREAM_R1_KERNEL(scale_frames,
                 void(float* weights, const float* factors, int64_t cells, int64_t begin, int64_t end));

}  // namespace stream_r1
