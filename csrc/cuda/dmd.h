// The weighted DMD loss and its gradient on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct DmdArgs {
  const void *x, *fake, *real_cond,
      *real_uncond;  // of one type; real_uncond is real_cond where there is none
  Planes x_planes, fake_planes, real_cond_planes, real_uncond_planes;
  Element element;
  float guidance;

  const float* w_intra;  // or null; a value a plane, or a plane of values
  bool w_intra_varies;   // within a plane
  Planes w_intra_planes;
  const bool* mask;  // or null
  bool mask_varies;
  Planes mask_planes;
  const float* w_inter;  // [B] or null

  int64_t batch, frames, channels, plane;  // plane: h * w
  int64_t blocks, planes_a_block;          // of a sample's F * C planes; the last block may be shorter

  float* distances;  // [B, blocks], sum of |x - real|
  float* kept;       // [B, blocks], elements that the mask keeps; whole numbers
  float* heaviest;   // [B, blocks], largest |w_intra * (fake - real)|; of float16 alone
  float* squares;    // [B, blocks], sum of direction * g
  float* factor;     // [B], of the direction in the gradient
  float* loss;

  void* direction;  // [B, F, C, plane]: w_intra * g where kept, else 0, in float16 times a power of two a
                    // sample; or the buffer of dmd_gradient_
  Planes direction_planes;
  Element direction_element;  // element's, or float32
  float scale;                // of what is added to the buffer
};

// Writes direction, factor and loss.
LaunchError launch_dmd_loss(const DmdArgs& args, Stream stream);

// Adds scale * factor * direction to the buffer.
LaunchError launch_dmd_gradient(const DmdArgs& args, Stream stream);

struct DmdScaleArgs {
  const void* direction;   // [B, n]
  const float* factor;     // [B]
  const float* grad_loss;  // one value
  void* grad;              // [B, n] = factor * grad_loss * direction
  int64_t batch, n;
  Element element;
};

LaunchError launch_dmd_scale(const DmdScaleArgs& args, Stream stream);

}  // namespace stream_r1::cuda
