#pragma once

#include "common/views.h"
#include "cpu/isa.h"

namespace stream_r1 {

struct GatedAddArgs {
  Source x, y;  // [B, T, D]
  int64_t x_batch_stride, x_token_stride, y_batch_stride, y_token_stride;
  Source gate;  // [B, F, D]
  int64_t gate_batch_stride, gate_frame_stride;
  Target out;       // [B, T, D] contiguous
  bool past_cache;  // see goes_past_cache()
  int64_t tokens, frames, width;
};

// Tokens begin .. end of the B * T tokens.
STREAM_R1_KERNEL(gated_add, void(const GatedAddArgs& args, int64_t begin, int64_t end));

struct GatedAddBackwardArgs {
  Source grad_out;  // [B, T, D] contiguous
  Source y;         // [B, T, D]
  int64_t y_batch_stride, y_token_stride;
  Source gate;  // [B, F, D]
  int64_t gate_batch_stride, gate_frame_stride;
  Target grad_y;  // [B, T, D] contiguous
  bool past_cache;
  float* gate_sums;  // [B, F, blocks, D], sums over the tokens of a block
  int64_t tokens, frames, width;
  int64_t blocks, tokens_a_block;  // of a frame's tokens; the last block may be shorter
};

// Blocks begin .. end of the B * F * blocks blocks.
STREAM_R1_KERNEL(gated_add_backward, void(const GatedAddBackwardArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
