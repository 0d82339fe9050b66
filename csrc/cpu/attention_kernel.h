// Loops of both attention ops; plain C++, no torch headers.

#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/views.h"

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
  KeyRange ranges[3];
  int num_ranges;
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
  float* lse;  // [B, H, T]
};

// Longest block of queries that attention_forward takes.
constexpr int64_t kMostQueries = 192;

// Work items [begin, end): item = (b * H + h) * num_blocks + block.
STREAM_R1_KERNEL(attention_forward, void(const AttentionArgs& args, int64_t begin, int64_t end));

// The gradients that are wanted: of q, and of keys[1]; keys[0] never has any. A block may be of any length.
struct AttentionBackwardArgs {
  AttentionArgs forward;  // out is not written, lse is read
  Source out, grad_out;
  Strides out_strides, grad_out_strides;
  const float* grad_lse;          // [B, H, T] or null
  Target grad_q, grad_k, grad_v;  // contiguous [B, T, H, D]
  int64_t fresh;                  // tokens of keys[1]
};

// Work items [begin, end): item = b * H + h.
STREAM_R1_KERNEL(attention_backward, void(const AttentionBackwardArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
