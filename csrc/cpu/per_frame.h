// Modulation per frame: [B, F, D] beside tokens [B, T, D], F dividing T.

#pragma once

#include <ATen/ATen.h>

namespace stream_r1 {

inline void check_per_frame(const char* op, const char* name, const at::Tensor& value, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": x: expected shape [B, T, D], got ", x.sizes());
  const bool fits = value.dim() == 3 && value.size(0) == x.size(0) && value.size(2) == x.size(2) &&
                    value.size(1) > 0 && x.size(1) % value.size(1) == 0;
  TORCH_CHECK_VALUE(fits, op, ": ", name, ": expected shape [B, F, D] with F dividing the tokens of x ",
                    x.sizes(), ", got ", value.sizes());
}

// A frame's tokens in blocks, each summed by itself: enough tasks for the cores when the frames are few, and
// sums that do not depend on how many threads there are.
struct FrameBlocks {
  explicit FrameBlocks(int64_t tokens_a_frame)
      : blocks((tokens_a_frame + 63) / 64),
        tokens_a_block(blocks == 0 ? 0 : (tokens_a_frame + blocks - 1) / blocks) {}
  int64_t blocks, tokens_a_block;
};

}  // namespace stream_r1
