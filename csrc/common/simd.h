// Vectors of floats in the width of the instruction set a kernel file is compiled for (GCC and Clang vector
// extensions). Only for kernel files (see cpu/isa.h).

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
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
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// a * b - c, rounded once: beside a large product a difference of two roundings would be as large as the
// result. In so many words, for compilers fuse a product and a difference only where they optimise.
inline Vec multiply_subtract(Vec a, float b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmsub_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmsub_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
#elif defined(__aarch64__)
  Vec difference;
  for (int64_t i = 0; i < kLanes; ++i) difference[i] = __builtin_fmaf(a[i], b, -c[i]);
  return difference;
#else
  typedef double Wide __attribute__((vector_size(kLanes * 8)));
  const Wide exact = __builtin_convertvector(a, Wide) * double(b) - __builtin_convertvector(c, Wide);
  return __builtin_convertvector(exact, Vec);
#endif
}

// Whether a comparison holds in any lane.
inline bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t seen = 0;
  for (int64_t i = 0; i < kLanes; ++i) seen |= mask[i];
  return seen != 0;
#endif
}

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

// e^x for x <= 88, to about one unit in the last place; zero below -87.3. The polynomial is Cephes' expf.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.3f);
  const Vec bounded = x < lowest ? lowest : x;  // not a number stays what it is
  const Vec shifted =
      bounded * 1.44269504f + 12582912.0f;  // the nearest integer, in the low bits of the mantissa
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

// 2^x for x < 128, to about one unit in the last place; zero below -126.5. 2^0 is 1 exactly. The polynomial
// is minimax on [-1/2, 1/2].
inline Vec exp2(Vec x) {
  const float magic = 12582912.0f + 127.0f;
#ifdef __AVX512F__
  const Vec bounded = (Vec)_mm512_max_ps((__m512)splat(-127.0f), (__m512)x);  // not a number stays what it is
#else
  const Vec bounded = x < -127.0f ? splat(-127.0f) : x;
#endif
  const Vec shifted = bounded + magic;  // the nearest integer + 127, in the low bits of the mantissa
  const Vec r = bounded - (shifted - magic);
  Vec p = splat(1.535336200e-4f);
  p = p * r + 1.339887445e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;  // the power's exponent
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// A thread's scratch memory, kept from call to call: fresh pages cost more than a small op.
struct ScratchArena {
  static constexpr size_t kMost = size_t{16} << 20;  // bytes that a thread keeps

  ~ScratchArena() { std::free(memory); }

  char* memory = nullptr;
  size_t size = 0, used = 0;  // of `memory`
  size_t live = 0, peak = 0;  // of all scratch, here or not
};

inline thread_local ScratchArena scratch_arena;

// Scratch memory of a task: aligned to a cache line, not initialised. What is made last goes first.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : bytes_((static_cast<size_t>(floats) * 4 + 63) / 64 * 64) {
    ScratchArena& arena = scratch_arena;
    if (arena.live == 0 && arena.peak > arena.size && arena.size < ScratchArena::kMost) {
      std::free(arena.memory);
      arena.size = arena.peak < ScratchArena::kMost ? arena.peak : ScratchArena::kMost;
      arena.memory = static_cast<char*>(std::aligned_alloc(64, arena.size));
    }
    arena.live += bytes_;
    arena.peak = arena.live > arena.peak ? arena.live : arena.peak;
#ifdef __SANITIZE_ADDRESS__
    kept_ = false;  // pieces of memory of their own, so that what is read past an end is found
#else
    kept_ = arena.size - arena.used >= bytes_;
#endif
    data_ = static_cast<float*>(kept_ ? static_cast<void*>(arena.memory + arena.used)
                                      : std::aligned_alloc(64, bytes_));
    arena.used += kept_ ? bytes_ : 0;
  }
  ~Scratch() {
    scratch_arena.live -= bytes_;
    if (kept_)
      scratch_arena.used -= bytes_;
    else
      std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() { return data_; }

 private:
  size_t bytes_;
  bool kept_;
  float* data_;
};

}  // namespace stream_r1::STREAM_R1_ISA
