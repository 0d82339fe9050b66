// The attention kernels on raw pointers: both attention ops. Plain C++.

#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace stream_r1::cuda {

// Strides in elements of a [B, T, H, D] tensor whose last dimension is contiguous. Every row of D elements
// starts at a multiple of 16 bytes.
struct HeadStrides {
  int64_t batch, token, head;
};

struct KeySegment {
  const void *k, *v;  // [B, tokens, H, D]
  HeadStrides k_strides, v_strides;
  int64_t tokens;
};

struct AttentionArgs {
  const void* q;  // [B, T, H, D]
  HeadStrides q_strides;
  KeySegment segments[2];  // past and fresh; either may have no tokens
  void* out;               // [B, T, H, D] contiguous, q's type
  float* lse;              // [B, H, T], of the scaled scores; -inf where a query sees no key
  float* partial_out;      // [splits, B, T, H, D], where splits > 1; not yet divided by the sums
  float *partial_maximum, *partial_sum;  // [splits, B, H, T], of the scores times log2 e, and of their exp2
  int32_t batch, heads, queries, head_dim;
  int32_t splits;  // parts of the keys, summed by separate blocks and combined in a second kernel
  float scale;     // of the scores
  // Who sees what in segments[1]: [blocks, 3 + 2 * ranges] of begin and end of at most kBlockQueries queries,
  // tiles of their keys, and begin and end of each range of keys. Null: all queries see all of both segments.
  const int32_t* table;
  int32_t blocks, ranges;
  bool is_bfloat16;  // else float16
};

constexpr int kBlockQueries = 128, kTileKeys = 64;

// Head widths that there are kernels for; rows of other widths are padded with zeros.
constexpr int64_t kHeadDims[] = {64, 128};

// Parts of the keys for which the blocks come close to filling `processors` once; 1 where the queries alone
// do.
int32_t attention_splits(const AttentionArgs& args, int32_t processors);

LaunchError launch_attention(const AttentionArgs& args, Stream stream);

}  // namespace stream_r1::cuda
