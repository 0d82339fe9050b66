// The gated residual on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct GatedAddArgs {
  const void *x, *y;  // [B, T, D]; the backward does not read x
  int64_t x_batch, x_token, y_batch, y_token;
  Source gate;  // [B, F, D]
  int64_t gate_batch, gate_frame;
  void* out;  // [B, T, D] contiguous, x's type
  int64_t batch, tokens, frames;
  int32_t width;
  Element x_element, y_element;  // x's is y's or float32
  int64_t rows_a_warp, whole;    // the forward's launch sets them: whether all rows are of `WholePack`s
  // The backward's:
  const void* grad_out;        // [B, T, D] contiguous, x's type
  void* grad_y;                // [B, T, D] contiguous, y's type
  float* gate_sums;            // [B, F, parts, D]
  int64_t parts, rows_a_part;  // of a frame's tokens
};

LaunchError launch_gated_add(GatedAddArgs args, Stream stream);

// Writes grad_y, and the sums that the gradient of gate is made of.
LaunchError launch_gated_add_backward(const GatedAddArgs& args, Stream stream);

}  // namespace stream_r1::cuda
