// Attention in tiles with a running softmax. Scores are kept transposed, [keys, queries]: the queries are
// transposed once an item and no key ever is, and the softmax runs along vectors of queries.

#include "cpu/attention_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/rows.h"
#include "cpu/tile_product.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr int64_t kKeys = 96;     // keys of a tile
constexpr int64_t kQueries = 48;  // queries of a tile
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Tokens [begin, begin + n) of one head as float rows, times `scale`, padded with zeros: to [n, width].
void copy_rows(const Source& from, const Strides& strides, int64_t b, int64_t h, int64_t begin, int64_t n,
               int64_t head_dim, float scale, float* to, int64_t width) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = to + i * width;
    const float* read =
        read_row(from, b * strides.batch + (begin + i) * strides.token + h * strides.head, head_dim, row);
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) row[d] = read[d] * scale;
    for (int64_t d = head_dim; d < width; ++d) row[d] = 0.0f;
  }
}

// rows [n, width] -> to [depth, columns], padded with zeros.
void transpose(const float* rows, int64_t n, int64_t width, int64_t depth, float* to, int64_t columns) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < depth; ++d) to[d * columns + i] = rows[i * width + d];
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t i = n; i < columns; ++i) to[d * columns + i] = 0.0f;
}

// scores [n, columns] -> exp(scores - new maximum), and for each query the maximum and sum so far; `decay` is
// what sums made with the old maximum have to be multiplied by.
void softmax_step(float* scores, int64_t n, int64_t columns, float* maximum, float* sum, float* decay) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec top = load(maximum + j);
    for (int64_t i = 0; i < n; ++i) top = max(load(scores + i * columns + j), top);
    Vec total{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec p = exp(load(scores + i * columns + j) - top);
      store(scores + i * columns + j, p);
      total += p;
    }
    const Vec shrink = exp(load(maximum + j) - top);
    store(decay + j, shrink);
    store(sum + j, load(sum + j) * shrink + total);
    store(maximum + j, top);
  }
}

struct Item {
  int64_t b, h;
  const QueryBlock* block;
};

void forward_item(const AttentionArgs& a, const Item& item, float* memory) {
  const int64_t b = item.b, h = item.h, width = padded(a.head_dim);
  const int64_t n = item.block->end - item.block->begin;
  const int64_t columns = padded(kQueries);  // of a tile of queries
  const int64_t tiles = (n + kQueries - 1) / kQueries;
  float* keys = memory;                                  // [kKeys, width]
  float* values = keys + kKeys * width;                  // [kKeys, width]
  float* scores = values + kKeys * width;                // [kKeys, columns]
  float* rows = scores + kKeys * columns;                // [kQueries, width]
  float* decay = rows + kQueries * width;                // [columns]
  float* queries = decay + columns;                      // [tiles, head_dim, columns]
  float* sums = queries + tiles * a.head_dim * columns;  // [n, width]
  float* maximum = sums + n * width;                     // [tiles, columns]
  float* total = maximum + tiles * columns;              // [tiles, columns]

  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kQueries, count = std::min(kQueries, n - first);
    copy_rows(a.q, a.q_strides, b, h, item.block->begin + first, count, a.head_dim, a.scale, rows, width);
    transpose(rows, count, width, a.head_dim, queries + tile * a.head_dim * columns, columns);
  }
  std::fill(sums, sums + n * width, 0.0f);
  std::fill(maximum, maximum + tiles * columns, -kInfinity);
  std::fill(total, total + tiles * columns, 0.0f);

  for (int r = 0; r < item.block->num_ranges; ++r) {
    const KeyRange& range = item.block->ranges[r];
    const Keys& from = a.keys[range.source];
    for (int64_t key = range.begin; key < range.end; key += kKeys) {
      const int64_t seen = std::min(kKeys, range.end - key);
      copy_rows(from.k, from.k_strides, b, h, key, seen, a.head_dim, 1.0f, keys, width);
      copy_rows(from.v, from.v_strides, b, h, key, seen, a.head_dim, 1.0f, values, width);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * kQueries, count = std::min(kQueries, n - first), wide = padded(count);
        product<Rows::as_they_lie, false>(seen, wide, a.head_dim, keys, width,
                                          queries + tile * a.head_dim * columns, columns, scores, columns);
        float* top = maximum + tile * columns;
        softmax_step(scores, seen, columns, top, total + tile * columns, decay);
        float* out = sums + first * width;
        for (int64_t i = 0; i < count; ++i)
          if (decay[i] != 1.0f)
            for (int64_t d = 0; d < width; d += kLanes)
              store(out + i * width + d, load(out + i * width + d) * decay[i]);
        product<Rows::transposed, true>(count, width, seen, scores, columns, values, width, out, width);
      }
    }
  }

  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = item.block->begin + i, slot = i / kQueries * columns + i % kQueries;
    const float factor = total[slot] > 0.0f ? 1.0f / total[slot] : (total[slot] == 0.0f ? 0.0f : total[slot]);
    const int64_t offset = b * a.out_strides.batch + t * a.out_strides.token + h * a.out_strides.head;
    float* out = row_to_write(a.out, offset, rows);
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] = sums[i * width + d] * factor;
    write_row(a.out, offset, a.head_dim, out);
    a.lse[(b * a.heads + h) * a.queries + t] =
        total[slot] == 0.0f ? -kInfinity : maximum[slot] + std::log(total[slot]);
  }
}

}  // namespace

void attention_forward(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t width = padded(args.head_dim), columns = padded(kQueries);
  const int64_t tiles = (kMostQueries + kQueries - 1) / kQueries;
  Scratch memory(kKeys * (2 * width + columns) + kQueries * width + columns +
                 tiles * columns * (args.head_dim + 2) + kMostQueries * width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / args.num_blocks;
    forward_item(args, {head / args.heads, head % args.heads, args.blocks + item % args.num_blocks}, memory);
  }
}

namespace {

// Scratch of the backward of one head.
struct BackwardMemory {
  BackwardMemory(const AttentionBackwardArgs& args, int64_t width, int64_t columns)
      : keys(kKeys * width),
        values(kKeys * width),
        weights(kKeys * columns),
        grad_scores(kKeys * columns),
        queries(kQueries * width),
        queries_t(width * columns),
        grads(kQueries * width),
        grads_t(width * columns),
        grad_queries(kQueries * width),
        lse(columns),
        delta(columns),
        row(width),
        grad_keys(args.fresh * width),
        grad_values(args.fresh * width) {}

  Scratch keys, values;            // [kKeys, width]
  Scratch weights, grad_scores;    // [kKeys, columns], transposed as in the forward
  Scratch queries, queries_t;      // [kQueries, width] and [width, columns], scaled
  Scratch grads, grads_t;          // of the output, the same
  Scratch grad_queries;            // [kQueries, width]
  Scratch lse, delta;              // [columns]
  Scratch row;                     // [width]
  Scratch grad_keys, grad_values;  // [fresh, width]
};

// Queries [first, first + count) of one head: lse, and delta = sum_d grad_out * out - grad_lse, padded so
// that the weights of padding are zero.
void read_statistics(const AttentionBackwardArgs& args, const Item& item, int64_t first, int64_t count,
                     int64_t columns, int64_t width, BackwardMemory& m) {
  const int64_t line = (item.b * args.forward.heads + item.h) * args.forward.queries + first;
  float* lse = m.lse;
  float* delta = m.delta;
  for (int64_t i = 0; i < columns; ++i) {
    lse[i] = i < count ? args.forward.lse[line + i] : kInfinity;
    delta[i] = 0.0f;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Strides& s = args.out_strides;
    const float* out = read_row(args.out, item.b * s.batch + (first + i) * s.token + item.h * s.head,
                                args.forward.head_dim, m.row);
    const float* grad = m.grads + i * width;
    float product = 0.0f;
#pragma omp simd reduction(+ : product)
    for (int64_t d = 0; d < args.forward.head_dim; ++d) product += out[d] * grad[d];
    delta[i] = product - (args.grad_lse == nullptr ? 0.0f : args.grad_lse[line + i]);
  }
}

// weights = exp(scores - lse), grad_scores = weights * (grad_weights - delta), in place, [seen, columns].
void softmax_backward(int64_t seen, int64_t wide, int64_t columns, BackwardMemory& m) {
  for (int64_t j = 0; j < wide; j += kLanes) {
    const Vec lse = load(m.lse + j), delta = load(m.delta + j);
    for (int64_t i = 0; i < seen; ++i) {
      const Vec p = exp(load(m.weights + i * columns + j) - lse);
      store(m.weights + i * columns + j, p);
      store(m.grad_scores + i * columns + j, p * (load(m.grad_scores + i * columns + j) - delta));
    }
  }
}

void write_rows(const float* rows, int64_t n, int64_t width, const AttentionArgs& a, const Item& item,
                int64_t tokens, int64_t first, float scale, const Target& to, float* buffer) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t offset = ((item.b * tokens + first + i) * a.heads + item.h) * a.head_dim;
    float* out = row_to_write(to, offset, buffer);
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] = rows[i * width + d] * scale;
    write_row(to, offset, a.head_dim, out);
  }
}

void backward_tile(const AttentionBackwardArgs& args, const Item& item, int64_t first, int64_t count,
                   int64_t width, BackwardMemory& m) {
  const AttentionArgs& a = args.forward;
  const int64_t columns = padded(kQueries), wide = padded(count);
  copy_rows(a.q, a.q_strides, item.b, item.h, first, count, a.head_dim, a.scale, m.queries, width);
  copy_rows(args.grad_out, args.grad_out_strides, item.b, item.h, first, count, a.head_dim, 1.0f, m.grads,
            width);
  transpose(m.queries, count, width, a.head_dim, m.queries_t, columns);
  transpose(m.grads, count, width, a.head_dim, m.grads_t, columns);
  read_statistics(args, item, first, count, columns, width, m);
  std::fill(m.grad_queries + 0, m.grad_queries + count * width, 0.0f);
  for (int r = 0; r < item.block->num_ranges; ++r) {
    const KeyRange& range = item.block->ranges[r];
    const Keys& from = a.keys[range.source];
    for (int64_t key = range.begin; key < range.end; key += kKeys) {
      const int64_t seen = std::min(kKeys, range.end - key);
      copy_rows(from.k, from.k_strides, item.b, item.h, key, seen, a.head_dim, 1.0f, m.keys, width);
      copy_rows(from.v, from.v_strides, item.b, item.h, key, seen, a.head_dim, 1.0f, m.values, width);
      product<Rows::as_they_lie, false>(seen, wide, a.head_dim, m.keys, width, m.queries_t, columns,
                                        m.weights, columns);
      product<Rows::as_they_lie, false>(seen, wide, a.head_dim, m.values, width, m.grads_t, columns,
                                        m.grad_scores, columns);
      softmax_backward(seen, wide, columns, m);
      product<Rows::transposed, true>(count, width, seen, m.grad_scores, columns, m.keys, width,
                                      m.grad_queries, width);
      if (range.source == 1) {
        product<Rows::as_they_lie, true>(seen, width, count, m.weights, columns, m.grads, width,
                                         m.grad_values + key * width, width);
        product<Rows::as_they_lie, true>(seen, width, count, m.grad_scores, columns, m.queries, width,
                                         m.grad_keys + key * width, width);
      }
    }
  }
  write_rows(m.grad_queries, count, width, a, item, a.queries, first, a.scale, args.grad_q, m.row);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.forward;
  const int64_t width = padded(a.head_dim);
  BackwardMemory m(args, width, padded(kQueries));
  for (int64_t head = begin; head < end; ++head) {
    std::fill(m.grad_keys + 0, m.grad_keys + args.fresh * width, 0.0f);
    std::fill(m.grad_values + 0, m.grad_values + args.fresh * width, 0.0f);
    Item item{head / a.heads, head % a.heads, nullptr};
    for (int64_t block = 0; block < a.num_blocks; ++block) {
      item.block = a.blocks + block;
      for (int64_t first = item.block->begin; first < item.block->end; first += kQueries)
        backward_tile(args, item, first, std::min(kQueries, item.block->end - first), width, m);
    }
    write_rows(m.grad_keys, args.fresh, width, a, item, args.fresh, 0, 1.0f, args.grad_k, m.row);
    write_rows(m.grad_values, args.fresh, width, a, item, args.fresh, 0, 1.0f, args.grad_v, m.row);
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
