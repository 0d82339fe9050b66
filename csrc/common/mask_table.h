// Which keys a query sees, as chunk_attention takes it from stream_r1_kernels.RangeMask.table: n, then for
// each block of queries its begin, its end and n ranges of keys, begin and end of each; (0, 0) where it has
// fewer.

#pragma once

#include <vector>

#include "common/tensors.h"

namespace stream_r1 {

struct MaskTable {
  int64_t ranges;  // of a block
  int64_t blocks;
  const int64_t* numbers;  // [blocks, 2 + 2 * ranges]

  const int64_t* row(int64_t block) const { return numbers + block * (2 + 2 * ranges); }
};

// Calls visit(begin, end) with every range of a block's row that has keys.
template <class Visit>
void for_ranges(const MaskTable& mask, const int64_t* row, const Visit& visit) {
  for (const int64_t* range = row + 2; range < row + 2 + 2 * mask.ranges; range += 2)
    if (range[0] < range[1]) visit(range[0], range[1]);
}

// The public function has checked before; this keeps kernels from reading past an end. The table has to live
// as long as what is returned.
inline MaskTable checked_table(const std::vector<int64_t>& table, int64_t tokens) {
  const char* op = "chunk_attention: table: ";
  const int64_t size = static_cast<int64_t>(table.size()) - 1, ranges = table.empty() ? -1 : table[0];
  STREAM_R1_CHECK(0 <= ranges && ranges <= size / 2 && size % (2 + 2 * ranges) == 0, op,
                  "expected n, then rows of 2 + 2 n numbers, got ", size + 1, " numbers for n = ", ranges);
  const MaskTable mask{ranges, size / (2 + 2 * ranges), table.data() + 1};
  int64_t place = 0;
  for (int64_t block = 0; block < mask.blocks; ++block) {
    const int64_t* row = mask.row(block);
    STREAM_R1_CHECK(place == row[0] && place < row[1], op, "expected a block from query ", place,
                    " on, got one from ", row[0], " to ", row[1]);
    place = row[1];
    int64_t before = 0;
    for_ranges(mask, row, [&](int64_t begin, int64_t end) {
      STREAM_R1_CHECK(before <= begin && end <= tokens, op, "expected ranges in order up to ", tokens,
                      ", got one from ", begin, " to ", end);
      before = end;
    });
  }
  STREAM_R1_CHECK(place == tokens, op, "expected blocks up to query ", tokens, ", got them up to ", place);
  return mask;
}

}  // namespace stream_r1
