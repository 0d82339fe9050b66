// Loops of qk_norm_rotary; plain C++, no torch headers.

#pragma once

#include <cstdint>

#include "common/views.h"
#include "cpu/isa.h"

namespace stream_r1 {

// One of q and k. Strides in elements.
struct NormRotarySide {
  Source x;  // [B, T, H * D]
  int64_t x_batch, x_token;
  const float* weight;               // [H * D]
  Target out;                        // forward: y [B, T, H, D];  backward: grad_x [B, T, H * D], contiguous
  bool past_cache;                   // see goes_past_cache()
  Source grad_out;                   // backward: [B, T, H, D]
  int64_t y_batch, y_token, y_head;  // of out (forward) or grad_out (backward)
};

// A row is a token, r = b * tokens + t.
struct NormRotaryArgs {
  int64_t tokens, heads, head_dim;
  float eps;
  const float *cos, *sin;   // [T, D / 2]
  Element element;          // of every source and target
  NormRotarySide sides[2];  // q, k
};

// Rows [begin, end).
STREAM_R1_KERNEL(norm_rotary, void(const NormRotaryArgs& args, int64_t begin, int64_t end));

// Rows [begin, end); adds their part of the weights' gradients to grad_weights [2, H * D].
STREAM_R1_KERNEL(norm_rotary_backward,
                 void(const NormRotaryArgs& args, int64_t begin, int64_t end, float* grad_weights));

}  // namespace stream_r1
