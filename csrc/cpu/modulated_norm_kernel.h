#pragma once

#include "common/views.h"
#include "cpu/isa.h"

namespace stream_r1 {

struct ModulatedNormArgs {
  Source x;  // [B, T, D]
  int64_t x_batch_stride, x_token_stride;
  Source shift, scale;  // [B, F, D]
  int64_t shift_batch_stride, shift_frame_stride, scale_batch_stride, scale_frame_stride;
  Target out;          // [B, T, D] contiguous
  bool past_cache;     // see goes_past_cache()
  float *mean, *rstd;  // [B, T]
  int64_t tokens, frames, width;
  float eps;
};

// Tokens begin .. end of the B * T tokens.
STREAM_R1_KERNEL(modulated_norm, void(const ModulatedNormArgs& args, int64_t begin, int64_t end));

struct ModulatedNormBackwardArgs {
  Source grad_out;  // [B, T, D] contiguous
  Source x;         // [B, T, D]
  int64_t x_batch_stride, x_token_stride;
  Source scale;  // [B, F, D]
  int64_t scale_batch_stride, scale_frame_stride;
  const float *mean, *rstd;  // [B, T]
  Target grad_x;             // [B, T, D] contiguous
  bool past_cache;
  float *shift_sums, *scale_sums;  // [B, F, blocks, D], sums over the tokens of a block
  int64_t tokens, frames, width;
  int64_t blocks, tokens_a_block;  // of a frame's tokens; the last block may be shorter
};

// Blocks begin .. end of the B * F * blocks blocks.
STREAM_R1_KERNEL(modulated_norm_backward,
                 void(const ModulatedNormBackwardArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
