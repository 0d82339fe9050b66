// Which keys a chunk of queries sees, as ranges of tokens: the mask's arithmetic, without tensors. Plain C++,
// shared by CPU and CUDA. The meaning is that of stream_r1_kernels.ChunkMask.

#pragma once

#include <cstdint>
#include <vector>

#include "common/host_device.h"

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

STREAM_R1_HOST_DEVICE inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
STREAM_R1_HOST_DEVICE inline int64_t greatest(int64_t a, int64_t b) { return a < b ? b : a; }

STREAM_R1_HOST_DEVICE inline void add_range(VisibleBlock& block, int64_t begin, int64_t end) {
  if (begin < end) block.ranges[block.num_ranges++] = {begin, end};
}

}  // namespace detail

// Chunks in `frames` frames.
STREAM_R1_HOST_DEVICE inline int64_t num_chunks(const ChunkMask& mask, int64_t frames) {
  const int64_t later = detail::greatest(0, frames - mask.first_chunk_frames);
  return frames == 0 ? 0 : 1 + (later + mask.frames_per_chunk - 1) / mask.frames_per_chunk;
}

// Writes what the queries of a chunk see, in a sequence of `frames` frames (each half of them when teacher
// forcing), to `block`; `noisy`: the chunk of the second half.
STREAM_R1_HOST_DEVICE inline void find_visible(const ChunkMask& mask, int64_t frames, int64_t chunk,
                                               bool noisy, VisibleBlock& block) {
  const int64_t tokens = mask.tokens_per_frame;
  const int64_t start = chunk == 0 ? 0 : mask.first_chunk_frames + (chunk - 1) * mask.frames_per_chunk;
  const int64_t end = detail::least(mask.first_chunk_frames + chunk * mask.frames_per_chunk, frames);
  const int64_t window_start = mask.window_frames > 0 ? detail::greatest(0, end - mask.window_frames) : 0;
  const int64_t sink_end = detail::least(mask.sink_frames, window_start);
  const int64_t half = noisy ? frames : 0;
  block.begin = (half + start) * tokens;
  block.end = (half + end) * tokens;
  block.num_ranges = 0;
  if (noisy) {
    detail::add_range(block, 0, detail::least(sink_end, start) * tokens);
    detail::add_range(block, detail::least(window_start, start) * tokens, start * tokens);
    detail::add_range(block, block.begin, block.end);
  } else {
    detail::add_range(block, 0, sink_end * tokens);
    detail::add_range(block, window_start * tokens, end * tokens);
  }
}

// One block a chunk: the clean ones, then, when teacher forcing, the noisy ones.
inline std::vector<VisibleBlock> visible_blocks(const ChunkMask& mask, int64_t frames) {
  std::vector<VisibleBlock> blocks;
  for (int half = 0; half < (mask.teacher_forcing ? 2 : 1); ++half)
    for (int64_t chunk = 0; chunk < num_chunks(mask, frames); ++chunk)
      find_visible(mask, frames, chunk, half == 1, blocks.emplace_back());
  return blocks;
}

}  // namespace stream_r1
