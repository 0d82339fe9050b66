// Loops of both attention ops; plain C++, no torch headers.

#pragma once

#include <cstdint>

#include "common/views.h"
#include "cpu/brgemm.h"
#include "cpu/isa.h"

namespace stream_r1 {

// Strides of a [B, T, H, D] tensor in elements; the last dimension is contiguous.
struct Strides {
  int64_t batch, token, head;
};

struct Keys {
  Source k, v;
  Strides k_strides, v_strides;
};

// Tokens [begin, end) of keys[source].
struct KeyRange {
  int source;
  int64_t begin, end;
};

// Queries [begin, end) see the keys of ranges[0 .. num_ranges).
struct QueryBlock {
  int64_t begin, end;
  const KeyRange* ranges;
  int64_t num_ranges;
};

struct AttentionArgs {
  int64_t heads, head_dim, queries;  // queries: T, the length of a row of lse
  float scale;
  Source q;
  Strides q_strides;
  Keys keys[2];
  const QueryBlock* blocks;
  int64_t num_blocks;
  Target out;
  Strides out_strides;
  // [B, H, T]; in float64, as the backward makes the weights again from it: at scores of 1e4 half a unit of
  // float32 is 5e-4 of each weight
  double* lse;
  Brgemm* brgemm;  // may be null
};

// Queries of a tile, and the longest block of queries that attention_forward takes. Keys are packed once a
// block, so longer blocks pack less.
constexpr int64_t kQueries = 64;
constexpr int64_t kMostQueries = 6 * kQueries;

// Work items [begin, end): item = (b * H + h) * num_blocks + block.
STREAM_R1_KERNEL_BF16(attention_forward, void(const AttentionArgs& args, int64_t begin, int64_t end));

// Keys [begin, end) of keys[source], which every block of queries either sees or doesn't.
struct KeyTile {
  int source;
  int64_t begin, end;
};

// Longest tile of keys that attention_backward takes.
constexpr int64_t kBackwardKeys = 96;

// The gradients that are wanted: of q, and of keys[1]; keys[0] never has any. A block may be of any length.
struct AttentionBackwardArgs {
  AttentionArgs forward;  // out is not written, lse is read
  Source out, grad_out;
  Strides out_strides, grad_out_strides;
  const float* grad_lse;  // [B, H, T] or null
  const KeyTile* tiles;
  int64_t num_tiles;
  int64_t splits;         // of a head's key tiles
  Target grad_q;          // contiguous [splits, B, T, H, D]: what each split adds
  Target grad_k, grad_v;  // contiguous [B, T, H, D]
  int64_t batch, fresh;   // fresh: tokens of keys[1]
};

// Work items [begin, end): item = (b * H + h) * splits + split. Split s has the key tiles s, s + splits, ...
STREAM_R1_KERNEL_BF16(attention_backward,
                      void(const AttentionBackwardArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
