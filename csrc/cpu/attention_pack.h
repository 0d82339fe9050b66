// Operands of attention's products (see tile_product.h), packed from tensors. Only for kernel files (see
// isa.h).
//
// Tokens are packed in one of three layouts, each padded with zeros:
//   rows        [tokens, head words]      words along the head, as they lie in the tensor
//   columns     [head words, tokens]      the same words, transposed
//   by token    [token words, head]       words along the tokens
// and [head, token words], the last one transposed.

#pragma once

#include <algorithm>

#include "cpu/attention_kernel.h"
#include "cpu/rows.h"
#include "cpu/tile_product.h"

namespace stream_r1::STREAM_R1_ISA {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sizes of a head's packed operands. A row of head words is padded to whole vectors.
template <class Math>
struct HeadSizes {
  explicit HeadSizes(int64_t head_dim)
      : head_dim(head_dim),
        words((head_dim + Math::kPerWord - 1) / Math::kPerWord),
        row(round_up(words, kLanes)),
        width(row * Math::kPerWord) {}

  int64_t head_dim;
  int64_t words;  // along the head
  int64_t row;    // words, padded
  int64_t width;  // the head, padded
};

// The scale of scores for powers of two: scores times it, and 2^x, are scores times `scale`, and e^x.
struct BinaryScale {
  explicit BinaryScale(float scale)
      : factor(static_cast<float>(scale * 1.4426950408889634)),
        ln2(scale == 0.0f ? 0.6931471805599453 : static_cast<double>(scale) / factor) {}

  float factor;
  double ln2;  // with the rounding of `factor`
};

template <class Math>
int64_t words_of(int64_t tokens) {
  return (tokens + Math::kPerWord - 1) / Math::kPerWord;
}

#if defined(__AVX512F__)
inline Vec interleave_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vec interleave_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
inline Vec interleave_low(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Vec interleave_high(Vec a, Vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline Vec interleave_low(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Vec interleave_high(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// from [rows, columns] -> to [columns, rows padded with zeros to whole vectors]. Reads rows of `from` to the
// end of a vector.
[[gnu::noinline]] inline void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride,
                                        float* to, int64_t to_stride) {
  constexpr int kHalf = kLanes / 2;
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r)
        square[r] = i + r < rows ? load(from + (i + r) * from_stride + j) : Vec{};
    // Interleaving the upper half of the rows with the lower one, log2(kLanes) times over, transposes.
#pragma GCC unroll 4
      for (int width = 1; width < kLanes; width *= 2) {
        Vec next[kLanes];
#pragma GCC unroll 8
        for (int r = 0; r < kHalf; ++r) {
          next[2 * r] = interleave_low(square[r], square[r + kHalf]);
          next[2 * r + 1] = interleave_high(square[r], square[r + kHalf]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = next[r];
      }
      const int64_t left = columns - j;
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r)
        if (r < left) store(to + (j + r) * to_stride + i, square[r]);
    }
}

// Tokens of one head, to read.
struct Tokens {
  const Source& source;
  const Strides& strides;
  int64_t b, h, begin, count;

  int64_t offset(int64_t i) const {
    return b * strides.batch + (begin + i) * strides.token + h * strides.head;
  }

  // Tokens of a head lie too far apart for the machine to foresee the next ones.
  void prefetch_after(int64_t i, int64_t head_dim) const {
    const int64_t size = source.element == Element::float32 ? 4 : 2, ahead = std::min(i + 8, count - 1);
    const char* row = static_cast<const char*>(source.data) + offset(ahead) * size;
    for (int64_t byte = 0; byte < head_dim * size; byte += 64) __builtin_prefetch(row + byte);
  }
};

// -> rows, [tokens, sizes.row].
inline void pack_rows(const Tokens& tokens, const HeadSizes<Float32>& sizes, float* to) {
  for (int64_t i = 0; i < tokens.count; ++i, to += sizes.row) {
    tokens.prefetch_after(i, sizes.head_dim);
    const float* from = read_row(tokens.source, tokens.offset(i), sizes.head_dim, to);
    if (from != to) std::memcpy(to, from, static_cast<size_t>(sizes.head_dim) * 4);
    for (int64_t d = sizes.head_dim; d < sizes.row; ++d) to[d] = 0.0f;
  }
}

// rows [tokens, sizes.row] -> by token, [tokens, sizes.width]: rows of floats are that already.
inline const float* pack_by_token(const float* rows, int64_t, const HeadSizes<Float32>&, float*) {
  return rows;
}

#ifdef __AVX512BF16__
inline void pack_rows(const Tokens& tokens, const HeadSizes<BFloat16>& sizes, float* to) {
  const uint16_t* data = static_cast<const uint16_t*>(tokens.source.data);
  const size_t bytes = static_cast<size_t>(sizes.head_dim) * 2, padded = static_cast<size_t>(sizes.row) * 4;
  for (int64_t i = 0; i < tokens.count; ++i, to += sizes.row) {
    tokens.prefetch_after(i, sizes.head_dim);
    std::memcpy(to, data + tokens.offset(i), bytes);
    std::memset(reinterpret_cast<char*>(to) + bytes, 0, padded - bytes);
  }
}

// rows [tokens, sizes.row] -> by token, [token words, sizes.width].
inline const float* pack_by_token(const float* rows, int64_t tokens, const HeadSizes<BFloat16>& sizes,
                                  float* to) {
  alignas(64) uint16_t low[32], high[32];
  for (int i = 0; i < 32; ++i) {
    low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    high[i] = static_cast<uint16_t>(low[i] + 16);
  }
  const __m512i low_half = _mm512_load_si512(low), high_half = _mm512_load_si512(high);
  float* write = to;
  for (int64_t i = 0; i < tokens; i += 2, write += sizes.width)
    for (int64_t d = 0; d < sizes.row; d += kLanes) {
      const float* read = rows + i * sizes.row + d;
      const __m512i first = _mm512_loadu_si512(read);
      const __m512i second = i + 1 < tokens ? _mm512_loadu_si512(read + sizes.row) : _mm512_setzero_si512();
      _mm512_storeu_si512(write + 2 * d, _mm512_permutex2var_epi16(first, low_half, second));
      _mm512_storeu_si512(write + 2 * d + kLanes, _mm512_permutex2var_epi16(first, high_half, second));
    }
  return to;
}
#endif

}  // namespace stream_r1::STREAM_R1_ISA
