// Products of small matrices that lie in the cache, summed in float32. Only for kernel files (see isa.h).
//
// Operands are made of 32-bit words along the depth of the product: a float, or two bfloat16 that lie side by
// side there. `a` is [rows, words] as it lies in memory, `b` [words, columns], the sums [rows, columns].

#pragma once

#include "common/simd.h"
#include "cpu/brgemm.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace stream_r1::STREAM_R1_ISA {

#ifdef __AVX512F__
constexpr int kTileVectors = 4;  // 24 sums of the 32 registers
#else
constexpr int kTileVectors = 2;  // 12 sums of the 16 registers
#endif

struct Float32 {
  static constexpr int64_t kPerWord = 1;

  static Vec multiply_add(Vec sum, const float* word, Vec b) { return sum + *word * b; }
  static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }

  // A vector of words from kPerWord vectors of values.
  static Vec join(const Vec* values) { return values[0]; }

  // A vector of values as words that lie side by side.
  static void store_row(float* words, Vec values) { store(words, values); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
  static constexpr int64_t kPerWord = 2;

  static Vec multiply_add(Vec sum, const float* word, Vec b) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
  }
  static Vec multiply_add(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static Vec join(const Vec* values) {
    const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values[0]));
    const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values[1]));
    return (Vec)_mm512_or_si512(first, _mm512_slli_epi32(second, 16));
  }

  static void store_row(float* words, Vec values) {
    const __m256bh row = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(words, &row, sizeof row);
  }
};
#endif

// Where sums start: at zero, at what is there, or at that times `decay` [columns].
struct Start {
  enum Kind { zero, there, decayed } kind;
  const float* decay = nullptr;
};

template <class Math, int kRows, int kVectors>
inline void product_tile(int64_t words, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         const Start& start, float* c, int64_t c_stride) {
  Vec sums[kRows][kVectors];
  if (start.kind == Start::zero) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Vec{};
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] = load(c + i * c_stride + j * kLanes);
  }
  if (start.kind == Start::decayed) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const Vec decay = load(start.decay + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sums[i][j] *= decay;
    }
  }
  for (int64_t k = 0; k < words; ++k) {
    Vec row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        sums[i][j] = Math::multiply_add(sums[i][j], a + i * a_stride + k, row[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
}

// Rows of a tile that is kVectors wide: as many as the registers hold, for the latency of the sums and the
// loads of `b` to be shared by many.
template <int kVectors>
constexpr int kTileRows = kVectors == kTileVectors ? 6 : 8;

// The last rows of a panel, fewer than 2 * kRows.
template <class Math, int kRows, int kVectors>
void product_rest(int64_t rows, int64_t words, const float* a, int64_t a_stride, const float* b,
                  int64_t b_stride, const Start& start, float* c, int64_t c_stride) {
  if (rows >= kRows) {
    product_tile<Math, kRows, kVectors>(words, a, a_stride, b, b_stride, start, c, c_stride);
    rows -= kRows, a += kRows * a_stride, c += kRows * c_stride;
  }
  if constexpr (kRows > 1)
    if (rows > 0)
      product_rest<Math, kRows / 2, kVectors>(rows, words, a, a_stride, b, b_stride, start, c, c_stride);
}

// Columns of kVectors vectors.
template <class Math, int kVectors>
void product_panel(int64_t rows, int64_t words, const float* a, int64_t a_stride, const float* b,
                   int64_t b_stride, const Start& start, float* c, int64_t c_stride) {
  constexpr int kRows = kTileRows<kVectors>;
  for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, c += kRows * c_stride)
    product_tile<Math, kRows, kVectors>(words, a, a_stride, b, b_stride, start, c, c_stride);
  product_rest<Math, 4, kVectors>(rows, words, a, a_stride, b, b_stride, start, c, c_stride);
}

inline void decay_columns(int64_t rows, int64_t columns, const float* decay, float* c, int64_t c_stride) {
  for (int64_t i = 0; i < rows; ++i, c += c_stride)
    for (int64_t j = 0; j < columns; j += kLanes) store(c + j, load(c + j) * load(decay + j));
}

// c [rows, columns] = start + a [rows, words] b [words, columns]; columns is a multiple of kLanes. By
// `brgemm`, if there is one and the words are bfloat16.
template <class Math>
[[gnu::noinline]] void product(Brgemm* brgemm, int64_t rows, int64_t columns, int64_t words, const float* a,
                               int64_t a_stride, const float* b, int64_t b_stride, Start start, float* c,
                               int64_t c_stride) {
  if (Math::kPerWord == 2 && brgemm != nullptr) {
    if (start.kind == Start::decayed) decay_columns(rows, columns, start.decay, c, c_stride);
    return brgemm(rows, columns, words * 2, a_stride * 2, b_stride, c_stride, start.kind != Start::zero, a, b,
                  c);
  }
  constexpr int64_t kPanel = kTileVectors * kLanes;
  for (; columns >= kPanel; columns -= kPanel, b += kPanel, c += kPanel, start.decay += kPanel)
    product_panel<Math, kTileVectors>(rows, words, a, a_stride, b, b_stride, start, c, c_stride);
  switch (columns / kLanes) {
    case 1:
      return product_panel<Math, 1>(rows, words, a, a_stride, b, b_stride, start, c, c_stride);
#ifdef __AVX512F__
    case 2:
      return product_panel<Math, 2>(rows, words, a, a_stride, b, b_stride, start, c, c_stride);
    case 3:
      return product_panel<Math, 3>(rows, words, a, a_stride, b, b_stride, start, c, c_stride);
#endif
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
