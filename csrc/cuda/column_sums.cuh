// Sums over rows for every column, without atomics: a block sums a stretch of rows for 256 columns, and a
// second kernel adds the stretches up in order.

#pragma once

#include "cuda/rows.cuh"

namespace stream_r1::cuda {

constexpr int kSumThreads = 256, kSumColumns = kWarp * kPack, kSumLanes = kSumThreads / kWarp;

struct Stretch {
  int64_t begin, end;
};

// sums[k][column] += the k-th value of term(row, column, count) for the rows of a stretch. Column blocks lie
// along blockIdx.y; warp w of the block takes every eighth row, its lanes 8 columns each. `term` returns
// kSums packs for `count` columns from `column` on.
template <int kSums, class Term>
__device__ __forceinline__ void sum_columns(const Stretch& rows, int64_t width, const Term& term,
                                            float* const (&sums)[kSums]) {
  __shared__ float of_lanes[kSumLanes][kSums][kSumColumns];
  const int lane = threadIdx.x / kWarp, first = threadIdx.x % kWarp * kPack;
  const int64_t column = int64_t(blockIdx.y) * kSumColumns + first;
  Pack total[kSums] = {};
  if (column < width)
    for (int64_t row = rows.begin + lane; row < rows.end; row += kSumLanes) {
      Pack terms[kSums];
      term(row, column, least(width - column, kPack), terms);
#pragma unroll
      for (int k = 0; k < kSums; ++k)
#pragma unroll
        for (int i = 0; i < kPack; ++i) total[k].v[i] += terms[k].v[i];
    }
#pragma unroll
  for (int k = 0; k < kSums; ++k)
#pragma unroll
    for (int i = 0; i < kPack; ++i) of_lanes[lane][k][first + i] = total[k].v[i];
  __syncthreads();
  const int64_t own = int64_t(blockIdx.y) * kSumColumns + threadIdx.x;
  if (own >= width) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    float sum = 0;
#pragma unroll
    for (int l = 0; l < kSumLanes; ++l) sum += of_lanes[l][k][threadIdx.x];
    sums[k][own] = sum;
  }
}

}  // namespace stream_r1::cuda
