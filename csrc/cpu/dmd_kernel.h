#pragma once

#include "common/views.h"
#include "cpu/isa.h"

namespace stream_r1 {

// Of the elements of a block.
struct DmdBlock {
  double distance;          // sum of |x - real|
  double squares;           // sum of w_intra * (fake - real)^2 over the kept elements
  int64_t kept;             // elements that the mask keeps
  float largest, heaviest;  // largest |fake - real| and |w_intra * (fake - real)|
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

  DmdBlock* blocks_out;        // [B, blocks]
  const float* inverse_scale;  // second pass: [B], 1 / mean |x - real|, 0 where that is no positive number
  Target direction;            // [B, F, C, h, w] in planes, or no data
  Planes direction_planes;
  const float* factor;  // second pass: [B], of the direction
  bool adds = false;    // second pass: to the direction's memory, else it is written there
};

// First pass over blocks begin .. end of the B * blocks blocks: what a DmdBlock holds and, where there is
// memory for it, direction = w_intra * (fake - real) where the mask keeps, else 0.
STREAM_R1_KERNEL(dmd_measure, void(const DmdArgs& args, int64_t begin, int64_t end));
// Second pass, when the mean is known: the direction is factor * w_intra * g, and the
// squares are those of w_intra * g^2.
STREAM_R1_KERNEL(dmd_directions, void(const DmdArgs& args, int64_t begin, int64_t end));

struct DmdScaleArgs {
  Source direction;     // [B, n]
  const float* factor;  // [B]
  Target grad;          // [B, n] = factor * direction
  int64_t n;
  int64_t blocks, elements_a_block;  // of a sample's n elements; the last block may be shorter
};

STREAM_R1_KERNEL(dmd_scale, void(const DmdScaleArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
