#pragma once

#include "common/views.h"
#include "cpu/brgemm.h"
#include "cpu/isa.h"

namespace stream_r1 {

// One of the layers that read the same x; their results lie side by side.
struct LinearLayer {
  Source weight;  // [columns, depth]
  int64_t weight_stride;
  Source bias;  // [columns]; data null: none
  int64_t columns, first_column;
};

struct FusedLinearArgs {
  Source x;  // [rows, depth]
  int64_t x_stride, rows, depth;
  const LinearLayer* layers;
  int64_t num_layers;
  bool gelu;
  Source residual;  // [rows, width] as out; data null: none
  int64_t residual_stride;
  Source gate;  // [B, F, width]; data null: none
  int64_t gate_batch_stride, gate_frame_stride;
  int64_t tokens_a_frame, frames;
  Target out;  // [rows, width] contiguous
  int64_t width;
  int64_t block_rows;  // rows that share a packed panel of weights; a multiple of kLinearRows
  Brgemm* brgemm;      // may be null
};

constexpr int64_t kLinearRows = 6;      // of a unit of work
constexpr int64_t kLinearColumns = 64;  // of a panel

inline int64_t linear_panels(const LinearLayer& layer) {
  return (layer.columns + kLinearColumns - 1) / kLinearColumns;
}

// Units [begin, end). A block of rows has groups of kLinearRows rows, the last block fewer; in the order of
// units come blocks, in a block all layers' panels, in a panel the groups.
STREAM_R1_KERNEL_BF16(fused_linear, void(const FusedLinearArgs& args, int64_t begin, int64_t end));

}  // namespace stream_r1
