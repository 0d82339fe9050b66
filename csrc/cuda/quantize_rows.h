// Rows in FP8 on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct QuantizeRowsArgs {
  const void* x;  // [B, T, K]
  int64_t x_batch, x_token;
  uint8_t* data;  // [B, T, K] contiguous, float8_e4m3fn
  float* scale;   // [B, T]
  int64_t batch, tokens;
  int32_t width, gelu;         // gelu: 1 or 0
  Element element;             // of x
  int64_t rows_a_warp, whole;  // the launch sets them: whether all rows are of `WholePack`s
};

LaunchError launch_quantize_rows(QuantizeRowsArgs args, Stream stream);

}  // namespace stream_r1::cuda
