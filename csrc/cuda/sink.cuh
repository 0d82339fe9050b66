// The sink of a streaming cache, once a chunk: the evicted chunk is averaged into the kept sink, and the copy
// that the next chunk sees is written, its keys turned in time. A thread has 8 channels of a token of the
// sink.

#pragma once

#include "cuda/qk_norm_rotary.cuh"
#include "cuda/sink.h"

namespace stream_r1::cuda {

constexpr int kSinkThreads = 256;

// T is the type of the storage, Kept that of the kept sink.
template <class T, class Kept>
__device__ __forceinline__ void renew_sink(const RenewSinkArgs& args) {
  const int packs = (args.head_dim + kPack - 1) / kPack;
  int64_t rest = int64_t(blockIdx.x) * kSinkThreads + threadIdx.x;
  const int i = static_cast<int>(rest % packs) * kPack, count = least(args.head_dim - i, kPack);
  rest /= packs;
  const int64_t kept_row = rest, h = rest % args.heads;
  rest /= args.heads;
  const int64_t token = rest % args.sink_tokens;
  rest /= args.sink_tokens;
  const int64_t b = rest % args.batch, layer = rest / args.batch;
  if (layer >= args.layers) return;

  const auto stored = [&](int64_t values, int64_t t) {  // keys: 0, values: 1
    const int64_t row = (((layer * 2 + values) * args.batch + b) * args.tokens + t) * args.heads + h;
    return static_cast<T*>(args.storage) + row * args.head_dim + i;
  };
  const auto average = [&](Pack& sink, const Pack& evicted) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) sink.v[j] = args.keep * sink.v[j] + args.add * evicted.v[j];
  };
  const auto turned = [&](const Pack& k, const float* cos, const float* sin) {
    return rotate(k, load_phases(cos, args.head_dim, i, count), load_phases(sin, args.head_dim, i, count),
                  1.f);
  };

  Kept* const kept_k = static_cast<Kept*>(args.sink_k) + kept_row * args.head_dim + i;
  Pack k =
      args.first ? load_pack<Memory::own>(stored(0, token), count) : load_pack<Memory::own>(kept_k, count);
  if (args.averages)
    average(k, turned(load_pack<Memory::own>(stored(0, args.slot + token), count), args.evicted_cos,
                      args.evicted_sin));
  if (args.averages || args.first) store_pack(kept_k, count, k);
  store_pack(stored(0, token), count,
             args.window_cos == nullptr ? k : turned(k, args.window_cos, args.window_sin));

  if (args.sink_v == nullptr) return;
  Kept* const kept_v = static_cast<Kept*>(args.sink_v) + kept_row * args.head_dim + i;
  Pack v =
      args.first ? load_pack<Memory::own>(stored(1, token), count) : load_pack<Memory::own>(kept_v, count);
  if (args.averages) average(v, load_pack<Memory::own>(stored(1, args.slot + token), count));
  store_pack(kept_v, count, v);
  store_pack(stored(1, token), count, v);
}

}  // namespace stream_r1::cuda
