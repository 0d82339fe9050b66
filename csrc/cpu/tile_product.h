// Products of small matrices that lie in the cache, in float32. Only for kernel files (see isa.h).

#pragma once

#include "common/simd.h"

namespace stream_r1::STREAM_R1_ISA {

constexpr int64_t kTileRows = 6;              // with 2 vectors a row: 12 accumulators of the 16 registers
constexpr int64_t kTileColumns = 2 * kLanes;  // matrices' widths are padded to this

inline int64_t padded(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns * kTileColumns; }

enum class Rows { as_they_lie, transposed };

template <int kRows, Rows kLayout, bool kAdd>
inline void product_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         float* c, int64_t c_stride) {
  Vec sums[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    sums[i][0] = kAdd ? load(c + i * c_stride) : Vec{};
    sums[i][1] = kAdd ? load(c + i * c_stride + kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float factor = kLayout == Rows::transposed ? a[k * a_stride + i] : a[i * a_stride + k];
      sums[i][0] += factor * b0;
      sums[i][1] += factor * b1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    store(c + i * c_stride, sums[i][0]);
    store(c + i * c_stride + kLanes, sums[i][1]);
  }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], or += with kAdd. columns is a multiple of
// kTileColumns. With Rows::transposed, `a` lies in memory as [depth, rows].
template <Rows kLayout, bool kAdd>
inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
                    const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  const int64_t a_step = kLayout == Rows::transposed ? 1 : a_stride;
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows)
      product_tile<kTileRows, kLayout, kAdd>(depth, a + i * a_step, a_stride, b + j, b_stride,
                                             c + i * c_stride + j, c_stride);
    const float* a_rest = a + i * a_step;
    float* c_rest = c + i * c_stride + j;
    switch (rows - i) {
      case 1:
        product_tile<1, kLayout, kAdd>(depth, a_rest, a_stride, b + j, b_stride, c_rest, c_stride);
        break;
      case 2:
        product_tile<2, kLayout, kAdd>(depth, a_rest, a_stride, b + j, b_stride, c_rest, c_stride);
        break;
      case 3:
        product_tile<3, kLayout, kAdd>(depth, a_rest, a_stride, b + j, b_stride, c_rest, c_stride);
        break;
      case 4:
        product_tile<4, kLayout, kAdd>(depth, a_rest, a_stride, b + j, b_stride, c_rest, c_stride);
        break;
      case 5:
        product_tile<5, kLayout, kAdd>(depth, a_rest, a_stride, b + j, b_stride, c_rest, c_stride);
        break;
    }
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
