// [before | silu(RMSNorm(x) * weight)] along the tokens, or without silu, on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct RmsNormSiluArgs {
  const void* x;  // [B, T, D]
  int64_t x_batch, x_token;
  Source weight;       // [D]
  const void* before;  // [B, P, D], copied
  int64_t before_batch, before_token;
  void* out;  // [B, P + T, D] contiguous
  int64_t batch, leading, tokens;
  int64_t lanes, whole;  // the launch sets them: lanes of a row; whether all rows are of `WholePack`s
  int32_t width;
  float eps;
  Element element;  // of x, before, out
};

LaunchError launch_rms_norm_silu(RmsNormSiluArgs args, bool silu, Stream stream);

}  // namespace stream_r1::cuda
