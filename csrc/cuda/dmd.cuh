// The weighted DMD loss in two passes over memory: |x - real| is summed, then g = (fake - real) / mean |x -
// real| is made, weighted, written and squared. Block (x, y): block x of the planes of sample y. Sums of
// blocks go to memory; each block of the next kernel adds them up in the same order. In float16 what is
// written is also scaled by a power of two a sample: w_intra * g may leave float16's range although its
// product with the factor does not.

#pragma once

#include <type_traits>

#include "cuda/dmd.h"
#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kDmdWarps = 8, kDmdThreads = kDmdWarps * kWarp;

// A thread's packs of a block's planes, one after the other.
struct PlanePack {
  int64_t b, f, c;
  int64_t start;  // in the plane
  int count;
};

template <class Body>
__device__ __forceinline__ void for_packs(const DmdArgs& args, const Body& body) {
  const int64_t packs = (args.plane + kPack - 1) / kPack, first = blockIdx.x * args.planes_a_block;
  const int64_t left = args.frames * args.channels - first;
  const int64_t planes = left < args.planes_a_block ? left : args.planes_a_block;
  for (int64_t i = threadIdx.x; i < planes * packs; i += kDmdThreads) {
    const int64_t plane = first + i / packs, start = i % packs * kPack;
    body(PlanePack{blockIdx.y, plane / args.channels, plane % args.channels, start,
                   least(args.plane - start, kPack)});
  }
}

template <class T, Memory kMemory = Memory::unchanging>
__device__ __forceinline__ Pack load_plane(const void* data, const Planes& planes, const PlanePack& at) {
  return load_pack<kMemory>(static_cast<const T*>(data) + planes.offset(at.b, at.f, at.c) + at.start,
                            at.count);
}

// real = cond + guidance * (cond - uncond)
template <class T, Memory kMemory = Memory::unchanging>
__device__ __forceinline__ Pack load_real(const DmdArgs& args, const PlanePack& at) {
  Pack real = load_plane<T, kMemory>(args.real_cond, args.real_cond_planes, at);
  const Pack uncond = load_plane<T, kMemory>(args.real_uncond, args.real_uncond_planes, at);
#pragma unroll
  for (int j = 0; j < kPack; ++j) real.v[j] += args.guidance * (real.v[j] - uncond.v[j]);
  return real;
}

// 1 where the mask keeps an element, else 0; 0 past the end of the plane.
__device__ __forceinline__ Pack load_mask(const DmdArgs& args, const PlanePack& at) {
  Pack keep;
  const bool* mask = args.mask + (args.mask == nullptr ? 0 : args.mask_planes.offset(at.b, at.f, at.c));
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const bool there = j < at.count;
    keep.v[j] = there && (args.mask == nullptr || mask[args.mask_varies ? at.start + j : 0]) ? 1.f : 0.f;
  }
  return keep;
}

// w_intra where the mask keeps an element, else 0.
__device__ __forceinline__ Pack load_weight(const DmdArgs& args, const PlanePack& at) {
  Pack weight = load_mask(args, at);
  if (args.w_intra == nullptr) return weight;
  const float* w = args.w_intra + args.w_intra_planes.offset(at.b, at.f, at.c);
  const float everywhere = args.w_intra_varies ? 0.f : *w;
  const Pack values = args.w_intra_varies ? load_pack(w + at.start, at.count) : Pack{};
#pragma unroll
  for (int j = 0; j < kPack; ++j)
    if (weight.v[j] != 0) weight.v[j] = args.w_intra_varies ? values.v[j] : everywhere;
  return weight;
}

// The sum of what the blocks of a sample left.
__device__ __forceinline__ float sum_of_blocks(const float* sums, int64_t sample, int64_t blocks) {
  float total = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kDmdThreads) total += sums[sample * blocks + i];
  return block_sum<kDmdWarps>(total);
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// A power of two times which w_intra * g of a sample is 2^13 to 2^15 at most; 1 where that is not finite.
__device__ __forceinline__ float shrinkage(const DmdArgs& args, int64_t sample, float inverse_scale) {
  float heaviest = 0;
  for (int64_t i = threadIdx.x; i < args.blocks; i += kDmdThreads)
    heaviest = fmaxf(heaviest, args.heaviest[sample * args.blocks + i]);
  heaviest = block_reduce<kDmdWarps>(heaviest, 0.f, larger);
  if (!(heaviest > 0 && heaviest < infinity() && inverse_scale > 0 && inverse_scale < infinity())) return 1;
  const auto exponent = [](float x) { return static_cast<int>(__float_as_uint(x) >> 23) - 127; };
  const int wanted = 13 - exponent(heaviest) - exponent(inverse_scale);
  return __uint_as_float((127 + (wanted < -60 ? -60 : wanted > 60 ? 60 : wanted)) << 23);
}

template <class T>
__device__ __forceinline__ void dmd_distances(const DmdArgs& args) {
  float distance = 0, kept = 0, heaviest = 0;
  for_packs(args, [&](const PlanePack& at) {
    const Pack x = load_plane<T>(args.x, args.x_planes, at), real = load_real<T>(args, at),
               keep = load_mask(args, at);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      distance += fabsf(x.v[j] - real.v[j]);  // 0 past the end of the plane
      kept += keep.v[j];
    }
    if constexpr (std::is_same_v<T, Fp16>) {
      const Pack fake = load_plane<T>(args.fake, args.fake_planes, at), weight = load_weight(args, at);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float difference = fabsf(fake.v[j] - real.v[j]);
        if (difference < infinity()) heaviest = fmaxf(heaviest, fabsf(weight.v[j]) * difference);
      }
    }
  });
  distance = block_sum<kDmdWarps>(distance);
  kept = block_sum<kDmdWarps>(kept);
  if constexpr (std::is_same_v<T, Fp16>) heaviest = block_reduce<kDmdWarps>(heaviest, 0.f, larger);
  if (threadIdx.x != 0) return;
  if constexpr (std::is_same_v<T, Fp16>) args.heaviest[blockIdx.y * args.blocks + blockIdx.x] = heaviest;
  args.distances[blockIdx.y * args.blocks + blockIdx.x] = distance;
  args.kept[blockIdx.y * args.blocks + blockIdx.x] = kept;
}

// kAdds: add to the buffer, else write the direction and what the loss needs. Out is the type of either.
template <class T, class Out, bool kAdds>
__device__ __forceinline__ void dmd_directions(const DmdArgs& args) {
  const int64_t b = blockIdx.y;
  const float elements = static_cast<float>(args.frames * args.channels * args.plane);
  const float inverse_scale = prim::divide(elements, sum_of_blocks(args.distances, b, args.blocks));
  const float kept = sum_of_blocks(args.kept, b, args.blocks);
  const float weight_of_sample = args.w_inter == nullptr ? 1.f : args.w_inter[b];
  const float factor = prim::divide(weight_of_sample, static_cast<float>(args.batch) * fmaxf(kept, 1));
  // the buffer that is added to may be one of the predictions, element by element
  constexpr Memory kMemory = kAdds ? Memory::own : Memory::unchanging;
  constexpr bool kShrinks = !kAdds && std::is_same_v<T, Fp16>;
  const float shrink = kShrinks ? shrinkage(args, b, inverse_scale) : 1.f;
  float squares = 0;
  for_packs(args, [&](const PlanePack& at) {
    Pack g = load_plane<T, kMemory>(args.fake, args.fake_planes, at);
    const Pack real = load_real<T, kMemory>(args, at), weight = load_weight(args, at);
    Out* to = static_cast<Out*>(args.direction) + args.direction_planes.offset(at.b, at.f, at.c) + at.start;
    Pack result = kAdds ? load_pack<kMemory>(to, at.count) : Pack{};
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float difference = (g.v[j] - real.v[j]) * inverse_scale;
      g.v[j] = fabsf(difference) < infinity() ? difference : 0.f;  // not a NaN, not infinite
      const float weighted = weight.v[j] * g.v[j] * shrink;
      squares += weighted * g.v[j];
      if constexpr (kAdds)
        result.v[j] += factor * args.scale * weighted;
      else
        result.v[j] = weighted;
    }
    store_pack(to, at.count, result);
  });
  if constexpr (!kAdds) {
    squares = block_sum<kDmdWarps>(squares);
    if (threadIdx.x != 0) return;
    args.squares[b * args.blocks + blockIdx.x] = squares;
    if (blockIdx.x == 0) args.factor[b] = prim::divide(factor, shrink);
  }
}

// loss = sum over samples of factor / 2 * squares. One block.
__device__ __forceinline__ void sum_loss(const DmdArgs& args) {
  float loss = 0;
  for (int64_t b = 0; b < args.batch; ++b)
    loss += 0.5f * args.factor[b] * sum_of_blocks(args.squares, b, args.blocks);
  if (threadIdx.x == 0) *args.loss = loss;
}

// Block (x, y): packs of sample y.
template <class T>
__device__ __forceinline__ void dmd_scale(const DmdScaleArgs& args) {
  const int64_t start = (int64_t(blockIdx.x) * kDmdThreads + threadIdx.x) * kPack;
  if (start >= args.n) return;
  const int count = least(args.n - start, kPack);
  const float factor = args.factor[blockIdx.y] * *args.grad_loss;
  const int64_t offset = blockIdx.y * args.n + start;
  Pack pack = load_pack(static_cast<const T*>(args.direction) + offset, count);
#pragma unroll
  for (int j = 0; j < kPack; ++j) pack.v[j] *= factor;
  store_pack(static_cast<T*>(args.grad) + offset, count, pack);
}

}  // namespace stream_r1::cuda
