// Rows of memory as packs of eight float32 values, and sums over the threads of a warp or a block.

#pragma once

#include <type_traits>

#include "common/views.h"
#include "cuda/prim.cuh"

namespace stream_r1::cuda {

constexpr int kPack = 8;  // elements that a thread handles at a time: 16 bytes of a 16-bit type
constexpr int kWarp = 32;

struct Pack {
  float v[kPack];
};

// In place of a count: a pack of 8 elements that starts at a multiple of 16 bytes. Nothing is tested then,
// and without branches in between the loads of several packs are under way at once.
struct WholePack {
  WholePack() = default;
  __device__ constexpr explicit WholePack(int) {}
  __device__ constexpr operator int() const { return kPack; }
};

// Who stores to memory that is read while the kernel runs: nobody, or the kernel itself.
enum class Memory { unchanging, own };

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Eight elements as they lie in memory.
template <class T>
struct Words {
  uint4 v[sizeof(T) / 2];
};

// `from` is a multiple of 16 bytes.
template <Memory kMemory = Memory::unchanging, class T>
__device__ __forceinline__ Words<T> load_words(const T* from) {
  Words<T> words;
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
    const uint4* piece = reinterpret_cast<const uint4*>(from) + i;
    words.v[i] = kMemory == Memory::own ? prim::load16(piece) : prim::load16_unchanging(piece);
  }
  return words;
}

template <class T>
__device__ __forceinline__ Pack to_pack(const Words<T>& words) {
  Pack pack;
  if constexpr (sizeof(T) == 2) {
    unpack<T>(words.v[0].x, pack.v[0], pack.v[1]);
    unpack<T>(words.v[0].y, pack.v[2], pack.v[3]);
    unpack<T>(words.v[0].z, pack.v[4], pack.v[5]);
    unpack<T>(words.v[0].w, pack.v[6], pack.v[7]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pack.v[4 * i] = __uint_as_float(words.v[i].x);
      pack.v[4 * i + 1] = __uint_as_float(words.v[i].y);
      pack.v[4 * i + 2] = __uint_as_float(words.v[i].z);
      pack.v[4 * i + 3] = __uint_as_float(words.v[i].w);
    }
  }
  return pack;
}

template <Memory kMemory = Memory::unchanging, class T>
__device__ __forceinline__ Pack load_pack(const T* from, WholePack) {
  return to_pack(load_words<kMemory>(from));
}

// `count` elements at `from`, as float32, the rest of the pack zero. Whole packs at multiples of 16 bytes are
// read 16 bytes at a time.
template <Memory kMemory = Memory::unchanging, class T>
__device__ __forceinline__ Pack load_pack(const T* from, int count) {
  Pack pack;
  if (count >= kPack && is_aligned(from)) {
    pack = to_pack(load_words<kMemory>(from));
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.v[i] = i < count ? to_float(from[i]) : 0.f;
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, WholePack, const Pack& pack) {
  if constexpr (sizeof(T) == 2) {
    prim::store16(to, make_uint4(pack2<T>(pack.v[0], pack.v[1]), pack2<T>(pack.v[2], pack.v[3]),
                                 pack2<T>(pack.v[4], pack.v[5]), pack2<T>(pack.v[6], pack.v[7])));
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      prim::store16(to + 4 * half,
                    make_uint4(__float_as_uint(pack.v[4 * half]), __float_as_uint(pack.v[4 * half + 1]),
                               __float_as_uint(pack.v[4 * half + 2]), __float_as_uint(pack.v[4 * half + 3])));
  }
}

// Rounds the first `count` values of a pack into `to`.
template <class T>
__device__ __forceinline__ void store_pack(T* to, int count, const Pack& pack) {
  if (count >= kPack && is_aligned(to)) {
    store_pack(to, WholePack{}, pack);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) to[i] = from_float<T>(pack.v[i]);
  }
}

// The same for tensors of which only the running kernel knows the type: small ones, read by many rows.
template <class Count>
__device__ __forceinline__ Pack load_pack(const Source& source, int64_t offset, Count count) {
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

// The rows of a warp: a block of kWarps has kWarps * rows_a_warp rows next to each other.
template <int kWarps, class Body>
__device__ __forceinline__ void for_rows(int64_t rows, int64_t rows_a_warp, const Body& body) {
  int64_t row = blockIdx.x * rows_a_warp * kWarps + threadIdx.x / kWarp;
  for (int64_t i = 0; i < rows_a_warp && row < rows; ++i, row += kWarps) body(row);
}

// A row that `lanes` lanes, a warp or a part of one, walk over several times, in packs. Whole rows are of
// `WholePack`s alone, and the first kHeld of a lane are read at once and stay in registers: of a 16-bit type
// all of 1536 channels. What is not held is read again: it is in the L1 cache by then.
template <class T, bool kWhole, int kHeld = kWhole ? 12 / sizeof(T) : 0>
class LaneRow {
 public:
  __device__ __forceinline__ LaneRow(const T* row, int width, int lane = threadIdx.x % kWarp,
                                     int lanes = kWarp)
      : row_(row), width_(width), first_(lane * kPack), step_(lanes * kPack) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {  // past the end the last pack, which is not used: there is no branch
      const int i = first_ + n * step_;
      held_[n] = load_words(row + (i < width ? i : width - kPack));
    }
  }

  // body(first channel, count, pack) for the packs of a lane, one after the other.
  template <class Body>
  __device__ __forceinline__ void walk(const Body& body) const {
    int i = first_;
#pragma unroll
    for (int n = 0; n < kHeld; ++n, i += step_)
      if (i < width_) body(i, WholePack{}, to_pack(held_[n]));
    for (; i < width_; i += step_) {
      const std::conditional_t<kWhole, WholePack, int> count{least(width_ - i, kPack)};
      body(i, count, load_pack(row_ + i, count));
    }
  }

 private:
  const T* row_;
  int width_, first_, step_;
  Words<T> held_[kHeld > 0 ? kHeld : 1];
};

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
