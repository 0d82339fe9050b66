// Loops of qk_norm_rotary; plain C++, no torch headers.

#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/views.h"

namespace stream_r1 {

// One of q and k. A row is a token, r = b * tokens + t. Strides in elements.
struct NormRotaryArgs {
  int64_t tokens, heads, head_dim;
  float eps;
  Source x;  // [B, T, H * D]
  int64_t x_batch, x_token;
  const float* weight;               // [H * D]
  const float *cos, *sin;            // [T, D / 2]
  Target out;                        // forward: y [B, T, H, D];  backward: grad_x [B, T, H * D], contiguous
  Source grad_out;                   // backward: [B, T, H, D]
  int64_t y_batch, y_token, y_head;  // of out (forward) or grad_out (backward)
};

// Rows [begin, end).
STREAM_R1_KERNEL(norm_rotary, void(const NormRotaryArgs& args, int64_t begin, int64_t end));

// Rows [begin, end); adds their part of the weight's gradient to grad_weight [H * D].
STREAM_R1_KERNEL(norm_rotary_backward,
                 void(const NormRotaryArgs& args, int64_t begin, int64_t end, float* grad_weight));

}  // namespace stream_r1
