#pragma once

#include "common/views.h"
#include "cpu/isa.h"

namespace stream_r1 {

struct RegionSaliencyArgs {
  Source grads;  // [M, B, T, C, H, W], rows of W without gaps
  int64_t axis_stride, batch_stride, frame_stride, channel_stride, row_stride;
  float* out;  // [M, B, F, h, w] contiguous
  int64_t batch, pixel_frames, channels, height, width;
  int64_t frames, rows, columns;  // F, h, w
};

// Bands begin .. end of the M * B * F * h bands; a band is a row of latent cells.
STREAM_R1_KERNEL(region_saliency, void(const RegionSaliencyArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
