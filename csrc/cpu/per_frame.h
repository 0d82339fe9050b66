// Sums over a frame's tokens, for the gradient of a modulation per frame.

#pragma once

#include <cstdint>

namespace stream_r1 {

// A frame's tokens in blocks, each summed by itself: enough tasks for the cores when the frames are few, and
// sums that do not depend on how many threads there are.
struct FrameBlocks {
  explicit FrameBlocks(int64_t tokens_a_frame)
      : blocks((tokens_a_frame + 63) / 64),
        tokens_a_block(blocks == 0 ? 0 : (tokens_a_frame + blocks - 1) / blocks) {}
  int64_t blocks, tokens_a_block;
};

}  // namespace stream_r1
