// Rows of float32, bfloat16 or float16 a vector at a time, computed in float32. A kernel is a template on the
// element and is chosen once a call (with_element). Only for kernel files (see isa.h).

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd.h"
#include "common/views.h"
#include "cpu/rows.h"

#define STREAM_R1_INLINE __attribute__((always_inline))

namespace stream_r1::STREAM_R1_ISA {

typedef uint32_t BitsVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

template <Element kElement>
using Stored = std::conditional_t<kElement == Element::float32, float, uint16_t>;

template <Element kElement>
inline const Stored<kElement>* at(const Source& source, int64_t offset) {
  return static_cast<const Stored<kElement>*>(source.data) + offset;
}

template <Element kElement>
inline Stored<kElement>* at(const Target& target, int64_t offset) {
  return static_cast<Stored<kElement>*>(target.data) + offset;
}

// Calls body(constant of the element).
template <class Body>
inline void with_element(Element element, const Body& body) {
  switch (element) {
    case Element::float32:
      return body(std::integral_constant<Element, Element::float32>());
    case Element::bfloat16:
      return body(std::integral_constant<Element, Element::bfloat16>());
    case Element::float16:
      return body(std::integral_constant<Element, Element::float16>());
  }
}

template <class To, class From>
inline To cast_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Zero-extends, and keeps the lower halves. Compilers split __builtin_convertvector of such vectors into many
// instructions.
inline BitsVec widen(HalfVec v) {
#if defined(__AVX512F__)
  return cast_bits<BitsVec>(_mm512_cvtepu16_epi32(cast_bits<__m256i>(v)));
#elif defined(__AVX2__)
  return cast_bits<BitsVec>(_mm256_cvtepu16_epi32(cast_bits<__m128i>(v)));
#else
  return __builtin_convertvector(v, BitsVec);
#endif
}

inline HalfVec narrow(BitsVec v) {
#if defined(__AVX512F__)
  return cast_bits<HalfVec>(_mm512_cvtepi32_epi16(cast_bits<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i bits = cast_bits<__m256i>(v);  // every lane is below 2^16: nothing saturates
  return cast_bits<HalfVec>(
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
#else
  return __builtin_convertvector(v, HalfVec);
#endif
}

inline Vec abs(Vec v) { return cast_bits<Vec>(cast_bits<BitsVec>(v) & 0x7fffffffu); }

template <Element kElement>
inline Vec load(const Stored<kElement>* p) {
  if constexpr (kElement == Element::float32) {
    return load(p);
  } else {
    HalfVec half;
    std::memcpy(&half, p, sizeof half);
    if constexpr (kElement == Element::bfloat16) {
      return cast_bits<Vec>(widen(half) << 16);
    } else {
#if defined(__AVX512F__)
      return cast_bits<Vec>(_mm512_cvtph_ps(cast_bits<__m256i>(half)));
#elif defined(__F16C__)
      return cast_bits<Vec>(_mm256_cvtph_ps(cast_bits<__m128i>(half)));
#else
      Vec v;
      for (int64_t i = 0; i < kLanes; ++i) v[i] = from_float16(half[i]);
      return v;
#endif
    }
  }
}

// Rounds to nearest, ties to even.
template <Element kElement>
inline void store(Stored<kElement>* p, Vec v) {
  if constexpr (kElement == Element::float32) {
    store(p, v);
  } else {
    HalfVec half;
    if constexpr (kElement == Element::bfloat16) {
      const BitsVec bits = cast_bits<BitsVec>(v);
      const BitsVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      half = narrow(v == v ? rounded : BitsVec{} + 0x7fc0u);
    } else {
#if defined(__AVX512F__)
      half = cast_bits<HalfVec>(_mm512_cvtps_ph(cast_bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
      half = cast_bits<HalfVec>(_mm256_cvtps_ph(cast_bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
      for (int64_t i = 0; i < kLanes; ++i) half[i] = to_float16(v[i]);
#endif
    }
    std::memcpy(p, &half, sizeof half);
  }
}

// Which lanes of a vector a step of for_vectors has; the others are read as 0 and not written.
struct AllLanes {};
struct FirstLanes {
  int64_t count;
};

template <Element kElement>
inline Vec load(const Stored<kElement>* p, AllLanes) {
  return load<kElement>(p);
}

template <Element kElement>
inline Vec load(const Stored<kElement>* p, FirstLanes lanes) {
  Stored<kElement> padded[kLanes] = {};
  std::memcpy(padded, p, lanes.count * sizeof *p);
  return load<kElement>(padded);
}

template <Element kElement>
inline void store(Stored<kElement>* p, Vec v, AllLanes) {
  store<kElement>(p, v);
}

template <Element kElement>
inline void store(Stored<kElement>* p, Vec v, FirstLanes lanes) {
  Stored<kElement> padded[kLanes];
  store<kElement>(padded, v);
  std::memcpy(p, padded, lanes.count * sizeof *p);
}

template <class Lanes>
inline Vec load(const float* p, Lanes lanes) {
  return load<Element::float32>(p, lanes);
}

template <class Lanes>
inline void store(float* p, Vec v, Lanes lanes) {
  store<Element::float32>(p, v, lanes);
}

// Stores past the caches where `past_cache`: a result that they can't keep would first be read into them, a
// quarter to a third of the traffic. `p` is aligned to a vector then (see tensors.h), and end_streaming()
// follows.
template <Element kElement>
inline void store(Stored<kElement>* p, Vec v, AllLanes lanes, [[maybe_unused]] bool past_cache) {
#if defined(__AVX2__)
  if (past_cache) {
    alignas(kLanes * sizeof(*p)) Stored<kElement> rounded[kLanes];
    store<kElement>(rounded, v);
#if defined(__AVX512F__)
    if constexpr (kElement == Element::float32)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(rounded));
    else
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(rounded));
#else
    if constexpr (kElement == Element::float32)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(rounded));
    else
      return _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(rounded));
#endif
  }
#endif
  store<kElement>(p, v, lanes);
}

template <Element kElement>
inline void store(Stored<kElement>* p, Vec v, FirstLanes lanes, bool) {
  store<kElement>(p, v, lanes);
}

inline void end_streaming([[maybe_unused]] bool past_cache) {
#if defined(__AVX2__)
  if (past_cache) _mm_sfence();
#endif
}

// v in the lanes of a step, `other` elsewhere.
inline Vec keep(Vec v, AllLanes, Vec) { return v; }

inline Vec keep(Vec v, FirstLanes lanes, Vec other) {
  for (int64_t i = lanes.count; i < kLanes; ++i) v[i] = other[i];
  return v;
}

// Four independent sums or extremes hide the latency of an addition.
constexpr int kParts = 4;

// Calls body(first element, lanes, constant < kParts) for the vectors of n elements. `body` must be
// STREAM_R1_INLINE: it is called several times, and what it accumulates has to stay in registers.
template <class Body>
STREAM_R1_INLINE inline void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    body(i, AllLanes(), std::integral_constant<int, 0>());
    body(i + kLanes, AllLanes(), std::integral_constant<int, 1>());
    body(i + 2 * kLanes, AllLanes(), std::integral_constant<int, 2>());
    body(i + 3 * kLanes, AllLanes(), std::integral_constant<int, 3>());
  }
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes(), std::integral_constant<int, 0>());
  if (i < n) body(i, FirstLanes{n - i}, std::integral_constant<int, 0>());
}

// The same without the parts: for bodies that accumulate nothing, or little beside what else they do.
template <class Body>
STREAM_R1_INLINE inline void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes());
  if (i < n) body(i, FirstLanes{n - i});
}

inline float sum_parts(const Vec (&parts)[kParts]) {
  const Vec v = (parts[0] + parts[1]) + (parts[2] + parts[3]);
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(cast_bits<__m512>(v));
#elif defined(__AVX2__)
  const __m256 all = cast_bits<__m256>(v);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return sum(v);
#endif
}

}  // namespace stream_r1::STREAM_R1_ISA
