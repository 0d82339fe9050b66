// The second stage of sums over rows. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

constexpr int64_t kRowsAPart = 64;  // that one block sums
constexpr int64_t kMostParts = 64;  // of one unit: what the second stage adds up

// Stretches that the rows of a unit are cut into, and their length.
struct Parts {
  explicit Parts(int64_t rows) {
    int64_t wanted = (rows + kRowsAPart - 1) / kRowsAPart;
    if (wanted > kMostParts) wanted = kMostParts;
    if (wanted < 1) wanted = 1;
    rows_a_part = (rows + wanted - 1) / wanted;
    parts = rows_a_part == 0 ? 1 : (rows + rows_a_part - 1) / rows_a_part;
  }
  int64_t parts, rows_a_part;
};

struct AddPartsArgs {
  const float* sums;  // [units, parts, width]
  Target out;         // [units, width]
  int64_t units, parts, width;
};

LaunchError launch_add_parts(const AddPartsArgs& args, Stream stream);

}  // namespace stream_r1::cuda
