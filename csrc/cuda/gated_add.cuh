// x + y * gate with a gate per frame. X is the type of x and out, Y that of y.

#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/gated_add.h"
#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kGateWarps = 8;  // rows of a block

// Where a token of y lies, and the gate of its frame.
struct GateRow {
  int64_t x, y, gate;  // offsets

  __device__ GateRow(const GatedAddArgs& args, int64_t row) {
    const int64_t b = row / args.tokens, t = row % args.tokens, frame = t / (args.tokens / args.frames);
    x = b * args.x_batch + t * args.x_token;
    y = b * args.y_batch + t * args.y_token;
    gate = b * args.gate_batch + frame * args.gate_frame;
  }
};

template <class X, class Y, bool kWhole>
__device__ __forceinline__ void gated_add_rows(const GatedAddArgs& args) {
  const int width = args.width;
  for_rows<kGateWarps>(args.batch * args.tokens, args.rows_a_warp, [&](int64_t index) {
    const GateRow place(args, index);
    const X* x_row = static_cast<const X*>(args.x) + place.x;
    const Y* y_row = static_cast<const Y*>(args.y) + place.y;
    X* out = static_cast<X*>(args.out) + index * width;
    const auto add = [&](int i, auto count, Pack x, const Pack& y) {
      const Pack gate = load_pack(args.gate, place.gate + i, count);
#pragma unroll
      for (int j = 0; j < kPack; ++j) x.v[j] += y.v[j] * gate.v[j];
      store_pack(out + i, count, x);
    };
    const int first = threadIdx.x % kWarp * kPack;
    if constexpr (kWhole) {
      constexpr int kAtOnce = 6 / sizeof(X);  // packs of a lane that are under way together
      for (int i = first; i < width; i += kAtOnce * kWarp * kPack) {
        Words<X> x[kAtOnce];
        Words<Y> y[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {  // past the end the last pack, which is not used
          const int next = i + n * kWarp * kPack, at = next < width ? next : width - kPack;
          x[n] = load_words(x_row + at);
          y[n] = load_words(y_row + at);
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          if (const int at = i + n * kWarp * kPack; at < width)
            add(at, WholePack{}, to_pack(x[n]), to_pack(y[n]));
      }
    } else {
      for (int i = first; i < width; i += kWarp * kPack) {
        const int count = least(width - i, kPack);
        add(i, count, load_pack(x_row + i, count), load_pack(y_row + i, count));
      }
    }
  });
}

template <class X, class Y>
__device__ __forceinline__ void gated_add(const GatedAddArgs& args) {
  if (args.whole)
    gated_add_rows<X, Y, true>(args);
  else
    gated_add_rows<X, Y, false>(args);
}

// grad_y = grad * gate, and parts of grad_gate = sum of grad * y over a frame's tokens. Block (b, frame,
// part).
template <class X, class Y>
__device__ __forceinline__ void gated_add_backward(const GatedAddArgs& args) {
  const int64_t part = blockIdx.x % args.parts, frame = blockIdx.x / args.parts;  // frame of B * F
  const int64_t tokens = args.tokens / args.frames, begin = part * args.rows_a_part;
  const Stretch stretch{frame * tokens + begin,
                        frame * tokens + begin + least(tokens - begin, static_cast<int>(args.rows_a_part))};
  const auto term = [&](int64_t index, int64_t column, int count, Pack(&terms)[1]) {
    const GateRow row(args, index);
    Pack grad = load_pack(static_cast<const X*>(args.grad_out) + index * args.width + column, count);
    const Pack y = load_pack(static_cast<const Y*>(args.y) + row.y + column, count),
               gate = load_pack(args.gate, row.gate + column, count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      terms[0].v[j] = grad.v[j] * y.v[j];
      grad.v[j] *= gate.v[j];
    }
    store_pack(static_cast<Y*>(args.grad_y) + index * args.width + column, count, grad);
  };
  sum_columns<1>(stretch, args.width, term, {args.gate_sums + int64_t(blockIdx.x) * args.width});
}

}  // namespace stream_r1::cuda
