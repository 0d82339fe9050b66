// Rows of any element type as rows of float32: kernels compute in float32 on a row that fits the L1 cache, so
// that one loop serves every combination of types. Only for kernel files (see isa.h).

#pragma once

#include <cstdint>
#include <cstring>

#include "common/views.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace stream_r1::STREAM_R1_ISA {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

// To nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  // A product shifts the exponent, which gets subnormals right; infinity and NaN need the largest exponent.
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return from_bits(sign | to_bits(scaled) | special);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000)                         // subnormal: adding 0.5 rounds to a multiple of 2^-24
    return sign | uint16_t(to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

// n elements from `offset` on as float32: the tensor's own memory if it is float32, else converted into
// `buffer`.
inline const float* read_row(const Source& source, int64_t offset, int64_t n, float* buffer) {
  if (source.element == Element::float32) return static_cast<const float*>(source.data) + offset;
  const uint16_t* row = static_cast<const uint16_t*>(source.data) + offset;
  if (source.element == Element::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bfloat16(row[i]);
    return buffer;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
#endif
  for (; i < n; ++i) buffer[i] = from_float16(row[i]);
  return buffer;
}

// Where to compute the elements that belong at `offset`: the tensor's own memory if it is float32, else
// `buffer`.
inline float* row_to_write(const Target& target, int64_t offset, float* buffer) {
  return target.element == Element::float32 ? static_cast<float*>(target.data) + offset : buffer;
}

// Rounds what was computed at row_to_write's pointer into the tensor.
inline void write_row(const Target& target, int64_t offset, int64_t n, const float* computed) {
  if (target.element == Element::float32) return;
  uint16_t* row = static_cast<uint16_t*>(target.data) + offset;
  if (target.element == Element::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[i] = to_bfloat16(computed[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(computed + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) row[i] = to_float16(computed[i]);
}

// Sum of term(i) over i < n. Four running sums a vector register wide hide the latency of an addition.
template <class Term>
inline float sum_terms(int64_t n, const Term& term) {
  const int64_t quarter = n / 4;
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += term(i);
    b += term(i + quarter);
    c += term(i + 2 * quarter);
    d += term(i + 3 * quarter);
  }
  for (int64_t i = 4 * quarter; i < n; ++i) a += term(i);
  return (a + b) + (c + d);
}

}  // namespace stream_r1::STREAM_R1_ISA
