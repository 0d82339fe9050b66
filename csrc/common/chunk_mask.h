// Which keys a chunk of queries sees, as ranges of tokens: the mask's arithmetic, without tensors. Plain C++,
// shared by CPU and CUDA. The meaning is that of stream_r1_kernels.ChunkMask.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace stream_r1 {

struct ChunkMask {
  int64_t tokens_per_frame, frames_per_chunk;
  int64_t window_frames;  // 0: no window
  int64_t sink_frames;
  int64_t first_chunk_frames;
  bool teacher_forcing;
};

struct TokenRange {
  int64_t begin, end;
};

// Queries [begin, end) see the keys of ranges[0 .. num_ranges), which don't overlap.
struct VisibleBlock {
  int64_t begin, end;
  TokenRange ranges[3];
  int num_ranges;
};

namespace detail {

inline void add_range(VisibleBlock& block, int64_t begin, int64_t end) {
  if (begin < end) block.ranges[block.num_ranges++] = {begin, end};
}

}  // namespace detail

// One block a chunk, for a sequence of `frames` frames (each half of them when teacher forcing).
inline std::vector<VisibleBlock> visible_blocks(const ChunkMask& mask, int64_t frames) {
  const int64_t tokens = mask.tokens_per_frame, noisy = frames * tokens;
  std::vector<VisibleBlock> clean_blocks, noisy_blocks;
  int64_t start = 0, end = std::min(mask.first_chunk_frames, frames);
  for (; start < frames; start = end, end = std::min(end + mask.frames_per_chunk, frames)) {
    const int64_t window_start = mask.window_frames > 0 ? std::max<int64_t>(0, end - mask.window_frames) : 0;
    const int64_t sink_end = std::min(mask.sink_frames, window_start);
    VisibleBlock clean{start * tokens, end * tokens, {}, 0};
    detail::add_range(clean, 0, sink_end * tokens);
    detail::add_range(clean, window_start * tokens, end * tokens);
    clean_blocks.push_back(clean);
    if (mask.teacher_forcing) {
      VisibleBlock own{noisy + start * tokens, noisy + end * tokens, {}, 0};
      detail::add_range(own, 0, std::min(sink_end, start) * tokens);
      detail::add_range(own, std::min(window_start, start) * tokens, start * tokens);
      detail::add_range(own, own.begin, own.end);
      noisy_blocks.push_back(own);
    }
  }
  clean_blocks.insert(clean_blocks.end(), noisy_blocks.begin(), noisy_blocks.end());
  return clean_blocks;
}

}  // namespace stream_r1
