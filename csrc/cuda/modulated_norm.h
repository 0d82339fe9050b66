// Adaptive layer norm per frame on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct ModulatedNormArgs {
  const void* x;  // [B, T, D]
  int64_t x_batch, x_token;
  Source shift, scale;  // [B, F, D]
  int64_t shift_batch, shift_frame, scale_batch, scale_frame;
  void* out;           // [B, T, D] contiguous; float8_e4m3fn where rows are quantised
  float *mean, *rstd;  // [B, T]; the backward reads them
  float* row_scale;    // [B, T], of out in FP8
  int64_t batch, tokens, frames;
  int32_t width;
  float eps;
  Element element;             // of x, out, grad_out, grad_x
  int64_t rows_a_warp, whole;  // the forward's launch sets them: whether all rows are of `WholePack`s
  // The backward's:
  const void* grad_out;            // [B, T, D] contiguous
  void* grad_x;                    // [B, T, D] contiguous
  float *shift_sums, *scale_sums;  // [B, F, parts, D]
  int64_t parts, rows_a_part;      // of a frame's tokens
};

LaunchError launch_modulated_norm(ModulatedNormArgs args, Stream stream);

// The same with rows in FP8: out and row_scale are written, mean and rstd are not.
LaunchError launch_modulated_norm_fp8(ModulatedNormArgs args, Stream stream);

// Writes grad_x, and the sums that the gradients of shift and scale are made of.
LaunchError launch_modulated_norm_backward(const ModulatedNormArgs& args, Stream stream);

}  // namespace stream_r1::cuda
