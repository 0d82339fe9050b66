#pragma once

#include "cpu/isa.h"
#include "cpu/views.h"

namespace stream_r1 {

// A tensor of planes [B, F, C] x [plane]; a plane lies in memory without gaps.
struct Planes {
  int64_t batch_stride = 0, frame_stride = 0, channel_stride = 0;

  int64_t offset(int64_t batch, int64_t frame, int64_t channel) const {
    return batch * batch_stride + frame * frame_stride + channel * channel_stride;
  }
};

struct DmdArgs {
  Source x, fake, real_cond, real_uncond;  // real_uncond is real_cond where there is none
  Planes x_planes, fake_planes, real_cond_planes, real_uncond_planes;
  float guidance;

  const float* w_intra = nullptr;  // a value a plane, or a plane of values
  bool w_intra_varies = false;     // within a plane
  Planes w_intra_planes;
  const bool* mask = nullptr;
  bool mask_varies = false;
  Planes mask_planes;

  int64_t frames, channels, plane;  // F, C, h * w
  int64_t blocks, planes_a_block;   // of a sample's F * C planes; the last block may be shorter

  // First pass, a value a block [B, blocks].
  double* distances;  // sum of |x - real|
  int64_t* kept;      // elements that the mask keeps
  // Second pass.
  const float* inverse_scale;  // [B], 1 / mean |x - real|
  double* squares;             // [B, blocks], sum of w_intra * g^2 over the kept elements, or null
  Target direction;            // w_intra * g where kept, else 0; or no data
  Planes direction_planes;
  const float* factor;  // [B], null: direction is written; else factor * direction is added to it
};

// Blocks begin .. end of the B * blocks blocks.
STREAM_R1_KERNEL(dmd_distances, void(const DmdArgs& args, int64_t begin, int64_t end));
STREAM_R1_KERNEL(dmd_directions, void(const DmdArgs& args, int64_t begin, int64_t end));

struct DmdScaleArgs {
  Source direction;     // [B, n]
  const float* factor;  // [B]
  Target grad;          // [B, n] = factor * direction
  int64_t n;
  int64_t blocks, elements_a_block;  // of a sample's n elements; the last block may be shorter
};

// Blocks begin .. end of the B * blocks blocks.
STREAM_R1_KERNEL(dmd_scale, void(const DmdScaleArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
