// float8_e4m3fn: rounding to it, and rows of it with a scale each.

#pragma once

#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr float kLargestE4m3 = 448.f;
constexpr float kLeastOfRow = 0x1p-96f;  // of a row's largest magnitude: 448 / it has to be finite

// Two numbers to nearest, ties to even, past 448 to 448, NaN to NaN; `low` in the lower byte.
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
  return both;
}
#else
__device__ __forceinline__ uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > __float_as_uint(infinity())) return 0x7f;
  if (magnitude >= __float_as_uint(kLargestE4m3)) return sign | 0x7e;
  // Below 2^-6 steps are 2^-9, as those of float32 are from 2^14 on: that addition rounds.
  constexpr float kSameSteps = 0x1p14f;
  if (magnitude < __float_as_uint(0x1p-6f))
    return sign | (__float_as_uint(__uint_as_float(magnitude) + kSameSteps) - __float_as_uint(kSameSteps));
  const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);  // 20 of 23 bits go
  return sign | (rounded - ((127 - 7) << 23)) >> 20;
}

__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  return to_e4m3(low) | to_e4m3(high) << 8;
}
#endif

// The first `count` values of a pack, times `factor`, to `to`.
__device__ __forceinline__ void store_e4m3(uint8_t* to, int count, const Pack& pack, float factor) {
  uint32_t pairs[kPack / 2];
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i)
    pairs[i] = pack_e4m3(pack.v[2 * i] * factor, pack.v[2 * i + 1] * factor);
  if (count >= kPack && reinterpret_cast<uintptr_t>(to) % kPack == 0) {
    prim::store8(to, make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16));
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) to[i] = static_cast<uint8_t>(pairs[i / 2] >> 8 * (i % 2));
  }
}

// The larger magnitude, as bits, which compare as magnitudes do; a NaN is larger than all.
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t largest, float value) {
  const uint32_t magnitude = __float_as_uint(value) & 0x7fffffff;
  return magnitude > largest ? magnitude : largest;
}

// What numbers of a row are multiplied with before they are rounded, and afterwards.
struct RowScale {
  float factor, scale;

  // Of the largest magnitude that each lane of a warp has seen.
  __device__ explicit RowScale(uint32_t largest) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      largest = larger_magnitude(largest, prim::exchange(__uint_as_float(largest), mask));
    const float found = __uint_as_float(largest);
    const float used = found < kLeastOfRow ? kLeastOfRow : found;  // NaN stays
    factor = prim::divide(kLargestE4m3, used);
    scale = prim::divide(used, kLargestE4m3);
  }
};

}  // namespace stream_r1::cuda
