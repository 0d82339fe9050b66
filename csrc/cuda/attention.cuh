// Attention of 128 queries of one head to tiles of 64 keys with a running softmax, on tensor cores
// (mma.sync).
//
// A block has 8 warps; each owns 16 queries and holds their sums in registers. Shared memory holds one tile
// of keys and one of values. Copies run while the other half of a step computes:
//
//     keys t arrive | scores = q k^T   (values t under way) | values t arrive
//                   | softmax, out += p v (keys t + 1 under way) | keys t + 1 arrive ...
//
// Tiles lie in shared memory as rows of 16-byte pieces; piece c of row r is at place c ^ (r % 8), so that
// eight rows of one piece, which is what a matrix load reads, are in different banks.

#pragma once

#include "cuda/attention.h"
#include "cuda/prim.cuh"

namespace stream_r1::cuda {

constexpr int kQueries = kBlockQueries, kKeys = kTileKeys, kThreads = 256;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int kHeadDim>
constexpr int attention_shared_bytes() {
  return (kQueries + 2 * kKeys) * kHeadDim * 2;
}

// Where piece `piece` of row `row` of a tile lies. Rows that differ by a multiple of 8 lie a constant apart:
// a loop over them moves `tile`, so that the compiler keeps one address, not one a step.
template <int kHeadDim>
__device__ __forceinline__ unsigned char* place(unsigned char* tile, int row, int piece) {
  return tile + 16 * (row * (kHeadDim / 8) + (piece ^ (row % 8)));
}

// Starts copying rows [0, present) into a tile of kRows rows; the others become zeros.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void start_tile(unsigned char* tile, const uint16_t* rows, int64_t stride,
                                           int present) {
  constexpr int kPieces = kHeadDim / 8, kRowsAtOnce = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const bool there = first + i < present;
    prim::start_copy(place<kHeadDim>(tile + i * kHeadDim * 2, first, piece),
                     rows + (there ? first + i : 0) * stride + piece * 8, there);
  }
}

// What is subtracted from scores whose maximum is given. A finite number, so that a score of -inf weighs
// nothing, also where a query has no other, and one of +inf makes a sum of +inf.
__device__ __forceinline__ float shift_for(float maximum) {
  return fminf(fmaxf(maximum, -largest_finite()), largest_finite());
}

__device__ __forceinline__ int tiles_of(int keys) { return (keys + kKeys - 1) / kKeys; }

// Keys [begin, begin + keys()) of a range that ends at `end`.
struct Tile {
  int range, begin, end;

  __device__ __forceinline__ int keys() const { return end - begin < kKeys ? end - begin : kKeys; }
};

// What a block of queries sees. Without a table range 0 is all of segment 0 and range 1 all of segment 1;
// with one, all ranges are of segment 1.
struct Visible {
  const AttentionArgs& args;
  const int32_t* row;

  __device__ __forceinline__ Visible(const AttentionArgs& args, int block)
      : args(args),
        row(args.table == nullptr ? nullptr : args.table + int64_t(block) * (3 + 2 * args.ranges)) {}

  __device__ __forceinline__ int begin(int block) const { return row == nullptr ? block * kQueries : row[0]; }
  __device__ __forceinline__ int end(int begin) const {
    if (row != nullptr) return row[1];
    return args.queries - begin < kQueries ? args.queries : begin + kQueries;
  }
  __device__ __forceinline__ int tiles() const {
    return row == nullptr ? tiles_of(args.segments[0].tokens) + tiles_of(args.segments[1].tokens) : row[2];
  }
  __device__ __forceinline__ int segment(const Tile& tile) const { return row == nullptr ? tile.range : 1; }

  __device__ __forceinline__ void enter(Tile& tile) const {
    tile.begin = row == nullptr ? 0 : row[3 + 2 * tile.range];
    tile.end = row == nullptr ? args.segments[tile.range].tokens : row[4 + 2 * tile.range];
  }
  __device__ __forceinline__ Tile at(int index) const {
    Tile tile{0, 0, 0};
    for (enter(tile); index >= tiles_of(tile.end - tile.begin); enter(tile)) {
      index -= tiles_of(tile.end - tile.begin);
      ++tile.range;
    }
    tile.begin += index * kKeys;
    return tile;
  }
  // The tile after one that is not the last.
  __device__ __forceinline__ Tile after(Tile tile) const {
    tile.begin += kKeys;
    while (tile.begin >= tile.end) {
      ++tile.range;
      enter(tile);
    }
    return tile;
  }
};

// One warp's 16 queries. With g = lane / 4 and t = lane % 4, a lane holds rows g and g + 8 (index r = 0, 1),
// columns 8 n + 2 t and 8 n + 2 t + 1, at [n][2 r] and [n][2 r + 1].
template <class T, int kHeadDim>
struct WarpAttention {
  static constexpr int kRowBytes = kHeadDim * 2;
  uint32_t queries[kHeadDim / 16][4];
  float out[kHeadDim / 8][4];
  float scores[kKeys / 8][4];
  float maximum[2], sum[2];  // of a row: its largest scaled score, and (this lane's part of) the sum of exp2

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[n][j] = 0;
    maximum[0] = maximum[1] = -infinity();
    sum[0] = sum[1] = 0;
  }

  __device__ __forceinline__ void load_queries(unsigned char* tile, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k)
      prim::load_matrices(queries[k],
                          place<kHeadDim>(tile + warp * 16 * kRowBytes, lane % 16, 2 * k + lane / 16));
  }

  // scores = q k^T
  __device__ __forceinline__ void multiply_keys(unsigned char* keys, int lane) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[n][j] = 0;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k)
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        prim::load_matrices(
            b, place<kHeadDim>(keys + n * 16 * kRowBytes, lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        prim::multiply_add<T>(scores[2 * n], queries[k], b[0], b[1]);
        prim::multiply_add<T>(scores[2 * n + 1], queries[k], b[2], b[3]);
      }
  }

  // scores -> exp2(scale * scores - maximum) for the first `keys` columns, 0 for the others; what was summed
  // with an older maximum is scaled down.
  __device__ __forceinline__ void softmax(int keys, float scale, int lane) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[n][j] *= scale;
    if (keys < kKeys) {
      const int column = lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (n * 8 + column + j % 2 >= keys) scores[n][j] = -infinity();
    }
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
    float shift[2], decay[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], prim::exchange(top[r], 1));
      top[r] = fmaxf(top[r], prim::exchange(top[r], 2));
      shift[r] = shift_for(top[r]);
      decay[r] = prim::exp2(maximum[r] - shift[r]);
      maximum[r] = top[r];
      sum[r] *= decay[r];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[n][j] = prim::exp2(scores[n][j] - shift[j / 2]);
        sum[j / 2] += scores[n][j];
      }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[n][j] *= decay[j / 2];
  }

  // out += p v
  __device__ __forceinline__ void add_values(unsigned char* values, int lane) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const float (&left)[4] = scores[2 * k], (&right)[4] = scores[2 * k + 1];
      const uint32_t p[4] = {pack2<T>(left[0], left[1]), pack2<T>(left[2], left[3]),
                             pack2<T>(right[0], right[1]), pack2<T>(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        prim::load_matrices_transposed(
            b, place<kHeadDim>(values + k * 16 * kRowBytes, lane % 16, 2 * n + lane / 16));
        prim::multiply_add<T>(out[2 * n], p, b[0], b[1]);
        prim::multiply_add<T>(out[2 * n + 1], p, b[2], b[3]);
      }
    }
  }

  // Adds the sums of the lanes of a row up.
  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += prim::exchange(sum[r], 1);
      sum[r] += prim::exchange(sum[r], 2);
    }
  }

  // Divides by the sums; returns each row's log-sum-exp in `lse`.
  __device__ __forceinline__ void divide_by_sums(float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = sum[r] == 0 ? 0.f : prim::divide(1.f, sum[r]);
      lse[r] = sum[r] == 0 ? -infinity() : (maximum[r] + prim::log2(sum[r])) * kLn2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[n][2 * r] *= inverse;
        out[n][2 * r + 1] *= inverse;
      }
    }
  }
};

// Block (x, y, z): queries x, head y = b * H + h, part z of the keys.
template <class T, int kHeadDim>
__device__ __forceinline__ void attention_block(const AttentionArgs& args) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char *const query_tile = shared, *const key_tile = query_tile + kQueries * kHeadDim * 2,
                       *const value_tile = key_tile + kKeys * kHeadDim * 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int b = blockIdx.y / args.heads, h = blockIdx.y % args.heads;

  const Visible visible(args, blockIdx.x);
  const int begin = visible.begin(blockIdx.x), present = visible.end(begin) - begin;
  const int64_t tiles = visible.tiles();
  const int first = static_cast<int>(tiles * blockIdx.z / args.splits),
            last = static_cast<int>(tiles * (blockIdx.z + 1) / args.splits);

  const auto start = [&](unsigned char* to, const void* data, const HeadStrides& strides, const Tile& tile) {
    const uint16_t* head = static_cast<const uint16_t*>(data) + b * strides.batch + h * strides.head;
    start_tile<kHeadDim, kKeys>(to, head + tile.begin * strides.token, strides.token, tile.keys());
  };
  const auto start_keys = [&](const Tile& tile) {
    const KeySegment& from = args.segments[visible.segment(tile)];
    start(key_tile, from.k, from.k_strides, tile);
  };
  const auto start_values = [&](const Tile& tile) {
    const KeySegment& from = args.segments[visible.segment(tile)];
    start(value_tile, from.v, from.v_strides, tile);
  };

  const uint16_t* q = static_cast<const uint16_t*>(args.q) + b * args.q_strides.batch +
                      h * args.q_strides.head + begin * args.q_strides.token;
  start_tile<kHeadDim, kQueries>(query_tile, q, args.q_strides.token, present);
  Tile tile{};
  if (first < last) start_keys(tile = visible.at(first));
  prim::commit_copies();

  WarpAttention<T, kHeadDim> own;
  own.clear();
  prim::wait_for_copies<0>();
  __syncthreads();  // queries and the first keys are there
  own.load_queries(query_tile, warp, lane);
  const float scale = args.scale * kLog2E;
#pragma unroll 1
  for (int index = first; index < last; ++index) {
    start_values(tile);
    prim::commit_copies();
    own.multiply_keys(key_tile, lane);
    prim::wait_for_copies<0>();
    __syncthreads();  // the values are there, and nobody reads the keys any more
    const int keys = tile.keys();
    if (index + 1 < last) start_keys(tile = visible.after(tile));
    prim::commit_copies();
    own.softmax(keys, scale, lane);
    own.add_values(value_tile, lane);
    prim::wait_for_copies<0>();
    __syncthreads();  // the next keys are there, and nobody reads the values any more
  }

  own.finish_sums();
  float lse[2];
  if (args.splits == 1) own.divide_by_sums(lse);
  const int64_t part = args.splits == 1 ? 0 : blockIdx.z;
  const int64_t of_rows = ((part * args.batch + b) * args.heads + h) * args.queries + begin;
  const int64_t out_row = ((part * args.batch + b) * args.queries + begin) * args.heads + h;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + g + 8 * r;
    if (args.splits > 1) {
      if (row >= present) continue;
      if (t == 0) {
        args.partial_maximum[of_rows + row] = own.maximum[r];
        args.partial_sum[of_rows + row] = own.sum[r];
      }
      float* to = args.partial_out + (out_row + int64_t(row) * args.heads) * kHeadDim + 2 * t;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(own.out[n][2 * r], own.out[n][2 * r + 1]);
    } else {
      if (t == 0 && row < present) args.lse[of_rows + row] = lse[r];
      // Through the query tile, whose rows of this warp nobody else reads, so that whole pieces go to memory.
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        *reinterpret_cast<uint32_t*>(place<kHeadDim>(query_tile, row, n) + 4 * t) =
            pack2<T>(own.out[n][2 * r], own.out[n][2 * r + 1]);
    }
  }
  if (args.splits > 1) return;
  __syncwarp();
  constexpr int kPieces = kHeadDim / 8;
#pragma unroll
  for (int i = 0; i < 16 * kPieces / 32; ++i) {
    const int index = lane + i * 32, row = warp * 16 + index / kPieces, piece = index % kPieces;
    if (row >= present) continue;
    uint16_t* to = static_cast<uint16_t*>(args.out) + (out_row + int64_t(row) * args.heads) * kHeadDim;
    prim::store16(to + 8 * piece, *reinterpret_cast<uint4*>(place<kHeadDim>(query_tile, row, piece)));
  }
}

// Puts the parts of a split sum together, each scaled by exp2(maximum of the part - maximum of all): of large
// scores a float32 log-sum-exp would not say enough. A thread makes 8 channels of one row (b, t, h).
template <class T>
__device__ __forceinline__ void combine_parts(const AttentionArgs& args) {
  const int pieces = args.head_dim / 8;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / pieces, rows = int64_t(args.batch) * args.queries * args.heads;
  if (row >= rows) return;
  const int piece = static_cast<int>(index % pieces);
  const int64_t h = row % args.heads, token = row / args.heads, t = token % args.queries,
                b = token / args.queries;
  const int64_t lse_row = (b * args.heads + h) * args.queries + t;

  float maximum = -infinity();
  for (int s = 0; s < args.splits; ++s) maximum = fmaxf(maximum, args.partial_maximum[s * rows + lse_row]);
  const float shift = shift_for(maximum);
  float total = 0, sums[8] = {};
  for (int s = 0; s < args.splits; ++s) {
    const float weight = prim::exp2(args.partial_maximum[s * rows + lse_row] - shift);
    total += weight * args.partial_sum[s * rows + lse_row];
    const float* from = args.partial_out + (s * rows + row) * args.head_dim + piece * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = prim::load16_unchanging(from + 4 * half);
      sums[4 * half] += weight * __uint_as_float(four.x);
      sums[4 * half + 1] += weight * __uint_as_float(four.y);
      sums[4 * half + 2] += weight * __uint_as_float(four.z);
      sums[4 * half + 3] += weight * __uint_as_float(four.w);
    }
  }
  const float inverse = total == 0 ? 0.f : prim::divide(1.f, total);
  uint16_t* to = static_cast<uint16_t*>(args.out) + row * args.head_dim + piece * 8;
  prim::store16(to, make_uint4(pack2<T>(sums[0] * inverse, sums[1] * inverse),
                               pack2<T>(sums[2] * inverse, sums[3] * inverse),
                               pack2<T>(sums[4] * inverse, sums[5] * inverse),
                               pack2<T>(sums[6] * inverse, sums[7] * inverse)));
  if (piece == 0) args.lse[lse_row] = total == 0 ? -infinity() : (shift + prim::log2(total)) * kLn2;
}

}  // namespace stream_r1::cuda
