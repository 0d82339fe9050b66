// Rows of memory as packs of eight float32 values, and sums over the threads of a warp or a block.

#pragma once

#include "common/views.h"
#include "cuda/prim.cuh"

namespace stream_r1::cuda {

constexpr int kPack = 8;  // elements that a thread handles at a time: 16 bytes of a 16-bit type
constexpr int kWarp = 32;

struct Pack {
  float v[kPack];
};

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// `count` elements at `from`, as float32, the rest of the pack zero. Whole packs at multiples of 16 bytes are
// read 16 bytes at a time.
template <class T>
__device__ __forceinline__ Pack load_pack(const T* from, int count) {
  Pack pack;
  if (count >= kPack && is_aligned(from)) {
    const uint4 words = prim::load16(from);
    if constexpr (sizeof(T) == 2) {
      unpack<T>(words.x, pack.v[0], pack.v[1]);
      unpack<T>(words.y, pack.v[2], pack.v[3]);
      unpack<T>(words.z, pack.v[4], pack.v[5]);
      unpack<T>(words.w, pack.v[6], pack.v[7]);
    } else {
      const uint4 more = prim::load16(from + 4);
      const uint32_t all[kPack] = {words.x, words.y, words.z, words.w, more.x, more.y, more.z, more.w};
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.v[i] = __uint_as_float(all[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.v[i] = i < count ? to_float(from[i]) : 0.f;
  }
  return pack;
}

// Rounds the first `count` values of a pack into `to`.
template <class T>
__device__ __forceinline__ void store_pack(T* to, int count, const Pack& pack) {
  if (count >= kPack && is_aligned(to)) {
    if constexpr (sizeof(T) == 2) {
      prim::store16(to, make_uint4(pack2<T>(pack.v[0], pack.v[1]), pack2<T>(pack.v[2], pack.v[3]),
                                   pack2<T>(pack.v[4], pack.v[5]), pack2<T>(pack.v[6], pack.v[7])));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        prim::store16(
            to + 4 * half,
            make_uint4(__float_as_uint(pack.v[4 * half]), __float_as_uint(pack.v[4 * half + 1]),
                       __float_as_uint(pack.v[4 * half + 2]), __float_as_uint(pack.v[4 * half + 3])));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) to[i] = from_float<T>(pack.v[i]);
  }
}

// The same for tensors of which only the running kernel knows the type: small ones, read by many rows.
__device__ __forceinline__ Pack load_pack(const Source& source, int64_t offset, int count) {
  if (source.element == Element::float32)
    return load_pack(static_cast<const float*>(source.data) + offset, count);
  if (source.element == Element::bfloat16)
    return load_pack(static_cast<const Bf16*>(source.data) + offset, count);
  return load_pack(static_cast<const Fp16*>(source.data) + offset, count);
}

__device__ __forceinline__ void store_value(const Target& target, int64_t offset, float value) {
  if (target.element == Element::float32)
    static_cast<float*>(target.data)[offset] = value;
  else if (target.element == Element::bfloat16)
    static_cast<Bf16*>(target.data)[offset] = from_float<Bf16>(value);
  else
    static_cast<Fp16*>(target.data)[offset] = from_float<Fp16>(value);
}

__device__ __forceinline__ int least(int64_t a, int b) { return a < b ? static_cast<int>(a) : b; }

// The sum over the lanes of a warp, the same in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += prim::exchange(value, mask);
  return value;
}

// Combines a value of every thread of the block, in an order that does not depend on timing; the same in
// every thread. Every thread has to call it, `kWarps` is the block's size in warps, and `identity` changes
// nothing.
template <int kWarps, class Combine>
__device__ __forceinline__ float block_reduce(float value, float identity, const Combine& combine) {
  __shared__ float of_warps[kWarps];
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, prim::exchange(value, mask));
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = identity;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total = combine(total, of_warps[w]);
  __syncthreads();  // the next reduction writes to the same place
  return total;
}

template <int kWarps>
__device__ __forceinline__ float block_sum(float value) {
  return block_reduce<kWarps>(value, 0.f, [](float a, float b) { return a + b; });
}

}  // namespace stream_r1::cuda
