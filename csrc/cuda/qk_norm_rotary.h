// Norm, head split and rotary of q and k on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

// One of q and k. Strides in elements; last dimensions are contiguous.
struct NormRotarySide {
  const void* x;  // [B, T, H * D]
  int64_t x_batch, x_token;
  Source weight;  // [H * D]
  void* y;        // [B, T, H, D]: written by the forward; the backward reads its gradient there
  int64_t y_batch, y_token, y_head;
  // The backward's:
  void* grad_x;        // [B, T, H * D] contiguous
  float* inverse_rms;  // [B * T]
  float* weight_sums;  // [parts, H * D]
};

struct NormRotaryArgs {
  NormRotarySide sides[2];  // q, k
  const float *cos, *sin;   // [T, D / 2] contiguous
  int64_t batch, tokens;
  int32_t heads, head_dim;
  float eps;
  Element element;             // of x and y
  int64_t rows_a_warp, whole;  // the forward's launch sets them: whether all rows are of `WholePack`s
  int64_t parts, rows_a_part;  // of the backward's sums over the B * T rows
};

LaunchError launch_norm_rotary(NormRotaryArgs args, Stream stream);

// Writes grad_x, inverse_rms and weight_sums; the weight's gradient is the sum of its parts.
LaunchError launch_norm_rotary_backward(const NormRotaryArgs& args, Stream stream);

}  // namespace stream_r1::cuda
