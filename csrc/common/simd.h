// Vectors of floats in the width of the instruction set a kernel file is compiled for (GCC and Clang vector extensions), and
// conversions from and to the 16-bit types. Only for kernel files (see cpu/isa.h).

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace stream_r1::STREAM_R1_ISA {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float max(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// A 16-bit float as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

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

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // The exponent is shifted by multiplying, which gets subnormals right; infinity and NaN need the largest exponent.
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f) | special);
}

// Rounding to nearest, ties to even; not a number stays that.
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}
inline void from_float(float x, Half* out) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  uint32_t half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  if (magnitude < 0x38800000) half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;  // subnormal: the adder rounds
  if (magnitude >= 0x47800000) half = 0x7c00;                                           // 65536 and up
  if (x != x) half = 0x7e00;
  out->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000) | half);
}

inline Vec load(const BFloat16* p) {
  HalfBits raw;
  std::memcpy(&raw, p, sizeof raw);
  const IntVec bits = __builtin_convertvector(raw, IntVec) << 16;
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline void store(BFloat16* p, Vec v) {
  IntVec bits;
  std::memcpy(&bits, &v, sizeof bits);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfBits raw = __builtin_convertvector(v == v ? rounded : IntVec{} + 0x7fc0, HalfBits);
  std::memcpy(p, &raw, sizeof raw);
}

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
#endif
}

inline void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < kLanes; ++i) from_float(lanes[i], p + i);
#endif
}

// n values to float, times `scale`.
template <class T>
inline void read_row(const T* from, int64_t n, float scale, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * scale);
  for (; i < n; ++i) to[i] = to_float(from[i]) * scale;
}

// n floats, times `scale`, rounded to T.
template <class T>
inline void write_row(const float* from, int64_t n, float scale, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * scale);
  for (; i < n; ++i) from_float(from[i] * scale, to + i);
}

// e^x for x <= 88, to about one unit in the last place; zero below -87.3. The polynomial is Cephes' expf.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.3f);
  const Vec bounded = x < lowest ? lowest : x;  // not a number stays what it is
  const Vec shifted = bounded * 1.44269504f + 12582912.0f;  // the nearest integer, in the low bits of the mantissa
  const Vec n = shifted - 12582912.0f;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;  // 2^n
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < lowest ? Vec{} : p * power;
}

// Scratch memory of a task: aligned to a cache line, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(floats) * 4 + 63) / 64 * 64))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() { return data_; }

 private:
  float* data_;
};

}  // namespace stream_r1::STREAM_R1_ISA
