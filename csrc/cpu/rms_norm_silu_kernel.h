#pragma once

#include "common/views.h"
#include "cpu/isa.h"

namespace stream_r1 {

struct RmsNormSiluArgs {
  Source x;  // [B, T, D]
  int64_t x_batch_stride, x_token_stride;
  const float* weight;  // [D]
  Source before;        // [B, P, D] of x's element; not read where leading = 0
  int64_t before_batch_stride, before_token_stride;
  Target out;       // [B, P + T, D] contiguous
  bool past_cache;  // see goes_past_cache()
  int64_t leading, tokens, width;
  float eps;
  bool silu;
};

// Rows begin .. end of the B * (P + T) rows of out.
STREAM_R1_KERNEL(rms_norm_silu, void(const RmsNormSiluArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
