// The forward of attention in tiles with a running softmax. Scores are kept transposed, [keys, queries], and
// so are the sums, [head, queries]: the softmax runs along vectors of queries, and of the two products with
// the keys and values each takes its own operand by rows.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_kernel.h"
#include "cpu/attention_pack.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr int64_t kKeys = 192;  // most keys of a tile
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// What maxima start with: the weight of a score of -inf is then 0, also where a query has no other.
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Queries of a tile, all tiles of a block about as long as each other.
int64_t tile_step(int64_t queries) {
  const int64_t tiles = (queries + kQueries - 1) / kQueries;
  return round_up((queries + tiles - 1) / tiles, kLanes);
}

// Scratch of the forward of one block of queries.
template <class Math>
struct ForwardMemory {
  ForwardMemory(const HeadSizes<Math>& sizes, int64_t queries, int64_t most_keys)
      : key_words(round_up(words_of<Math>(most_keys), kLanes)),
        columns(round_up(std::min(queries, kQueries), kLanes)),
        tiles((queries + kQueries - 1) / kQueries),
        staging(std::max(most_keys, columns) * sizes.row),
        by_token(words_of<Math>(most_keys) * sizes.width),
        keys(most_keys * sizes.row),
        values(sizes.width * key_words),
        scores(most_keys * columns),
        queries_t(tiles * sizes.words * columns),
        sums(tiles * sizes.width * columns),
        rows(columns * sizes.width),
        maximum(tiles * columns),
        total(tiles * columns),
        decay(columns) {}

  int64_t key_words, columns, tiles;
  Scratch staging;         // [tokens, row words]
  Scratch by_token;        // [key words, width]
  Scratch keys;            // [keys, row words]
  Scratch values;          // [width, key words]
  Scratch scores;          // [keys, columns]
  Scratch queries_t;       // [tiles, head words, columns]
  Scratch sums;            // [tiles, width, columns]
  Scratch rows;            // [columns, width]
  Scratch maximum, total;  // [tiles, columns]
  Scratch decay;           // [columns]
};

// The largest of factor * scores [n, one vector] and `start`.
Vec column_maximum(const float* scores, int64_t n, int64_t columns, float factor, Vec start) {
  Vec top[4] = {start, start, start, start};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) top[u] = max(load(scores + (i + u) * columns) * factor, top[u]);
  for (; i < n; ++i) top[0] = max(load(scores + i * columns) * factor, top[0]);
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

// The sum of weights beside a score of +inf: inf, as that of torch's logsumexp, or NaN where a score is one.
float infinite_total(const float* scores, int64_t n, int64_t columns, float factor, float before) {
  bool hidden = std::isnan(before);
  for (int64_t i = 0; i < n; ++i) hidden |= std::isnan(scores[i * columns] * factor);
  return hidden ? std::numeric_limits<float>::quiet_NaN() : kInfinity;
}

// scores [n, columns] -> 2^(factor * scores - new maximum) as words along the keys, in place, and for each
// query the maximum and sum so far; `decay` is what sums made with the old maximum have to be multiplied by.
template <class Math>
[[gnu::noinline]] void softmax_step(float* scores, int64_t n, int64_t wide, int64_t columns, float factor,
                                    float* maximum, float* total, float* decay) {
  for (int64_t j = 0; j < wide; j += kLanes) {
    const Vec top = column_maximum(scores + j, n, columns, factor, load(maximum + j));
    float totals[kLanes];
    const bool infinite = any(top == kInfinity);  // read before the scores are overwritten
    for (int64_t lane = 0; infinite && lane < kLanes; ++lane)
      totals[lane] = infinite_total(scores + j + lane, n, columns, factor, total[j + lane]);
    Vec sums[Math::kPerWord] = {};
    for (int64_t i = 0; i < n; i += Math::kPerWord) {
      Vec weights[Math::kPerWord];
      for (int64_t u = 0; u < Math::kPerWord; ++u) {
        weights[u] =
            i + u < n ? exp2(multiply_subtract(load(scores + (i + u) * columns + j), factor, top)) : Vec{};
        sums[u] += weights[u];
      }
      store(scores + i / Math::kPerWord * columns + j, Math::join(weights));
    }
    Vec sum = sums[0];
    for (int64_t u = 1; u < Math::kPerWord; ++u) sum += sums[u];
    const Vec shrink = exp2(load(maximum + j) - top);
    store(decay + j, shrink);
    store(total + j, load(total + j) * shrink + sum);
    for (int64_t lane = 0; infinite && lane < kLanes; ++lane)
      if (top[lane] == kInfinity) total[j + lane] = totals[lane];
    store(maximum + j, top);
  }
}

template <class Math>
class ForwardItem {
 public:
  ForwardItem(const AttentionArgs& args, const HeadSizes<Math>& sizes, ForwardMemory<Math>& memory, int64_t b,
              int64_t h, const QueryBlock& block)
      : a_(args),
        sizes_(sizes),
        m_(memory),
        b_(b),
        h_(h),
        block_(block),
        tiles_((block.end - block.begin + kQueries - 1) / kQueries),
        step_(tile_step(block.end - block.begin)),
        scale_(args.scale) {}

  void run() {
    for (int64_t tile = 0; tile < tiles_; ++tile) start(tile);
    for (int64_t r = 0; r < block_.num_ranges; ++r) {
      const KeyRange& range = block_.ranges[r];
      // Tiles about as long as each other.
      const int64_t length = range.end - range.begin, count = (length + kKeys - 1) / kKeys;
      const int64_t step =
          count == 0 ? kKeys : round_up((length + count - 1) / count, kTileRows<kTileVectors>);
      for (int64_t key = range.begin; key < range.end; key += step)
        add_keys(a_.keys[range.source], key, std::min(step, range.end - key));
    }
    for (int64_t tile = 0; tile < tiles_; ++tile) finish(tile);
  }

 private:
  int64_t first(int64_t tile) const { return block_.begin + tile * step_; }
  int64_t count(int64_t tile) const { return std::min(step_, block_.end - first(tile)); }
  float* queries(int64_t tile) { return m_.queries_t + tile * sizes_.words * m_.columns; }
  float* sums(int64_t tile) { return m_.sums + tile * sizes_.width * m_.columns; }

  void start(int64_t tile) {
    pack_rows({a_.q, a_.q_strides, b_, h_, first(tile), count(tile)}, sizes_, m_.staging);
    transpose(m_.staging, count(tile), sizes_.words, sizes_.row, queries(tile), m_.columns);
    std::fill_n(sums(tile), sizes_.width * m_.columns, 0.0f);
    std::fill_n(m_.maximum + tile * m_.columns, m_.columns, kLowest);
    std::fill_n(m_.total + tile * m_.columns, m_.columns, 0.0f);
  }

  void add_keys(const Keys& from, int64_t key, int64_t seen) {
    pack_rows({from.k, from.k_strides, b_, h_, key, seen}, sizes_, m_.keys);
    pack_rows({from.v, from.v_strides, b_, h_, key, seen}, sizes_, m_.staging);
    const int64_t words = words_of<Math>(seen);
    const float* by_token = pack_by_token(m_.staging, seen, sizes_, m_.by_token);
    transpose(by_token, words, sizes_.head_dim, sizes_.width, m_.values, m_.key_words);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t wide = round_up(count(tile), kLanes), columns = m_.columns;
      product<Math>(a_.brgemm, seen, wide, sizes_.words, m_.keys, sizes_.row, queries(tile), columns,
                    {Start::zero}, m_.scores, columns);
      softmax_step<Math>(m_.scores, seen, wide, columns, scale_.factor, m_.maximum + tile * columns,
                         m_.total + tile * columns, m_.decay);
      product<Math>(a_.brgemm, sizes_.head_dim, wide, words, m_.values, m_.key_words, m_.scores, columns,
                    {Start::decayed, m_.decay}, sums(tile), columns);
    }
  }

  void finish(int64_t tile) {
    transpose(sums(tile), sizes_.head_dim, count(tile), m_.columns, m_.rows, sizes_.width);
    double* lse = a_.lse + (b_ * a_.heads + h_) * a_.queries + first(tile);
    for (int64_t i = 0; i < count(tile); ++i) {
      const float total = m_.total[tile * m_.columns + i], top = m_.maximum[tile * m_.columns + i];
      const float factor = total == 0.0f ? 0.0f : 1.0f / total;
      float* row = m_.rows + i * sizes_.width;
      for (int64_t d = 0; d < sizes_.head_dim; ++d) row[d] *= factor;
      write(row,
            b_ * a_.out_strides.batch + (first(tile) + i) * a_.out_strides.token + h_ * a_.out_strides.head);
      lse[i] = total == 0.0f ? -kInfinity : top * scale_.ln2 + std::log(double(total));
    }
  }

  void write(float* row, int64_t offset) {
    float* out = row_to_write(a_.out, offset, row);
    if (out != row) std::memcpy(out, row, static_cast<size_t>(sizes_.head_dim) * 4);
    write_row(a_.out, offset, sizes_.head_dim, row);
  }

  const AttentionArgs& a_;
  const HeadSizes<Math>& sizes_;
  ForwardMemory<Math>& m_;
  int64_t b_, h_;
  const QueryBlock& block_;
  int64_t tiles_, step_;  // tiles of queries, and queries of one
  BinaryScale scale_;
};

template <class Math>
void forward(const AttentionArgs& args, int64_t begin, int64_t end) {
  const HeadSizes<Math> sizes(args.head_dim);
  int64_t queries = 0, keys = 0;
  for (int64_t i = 0; i < args.num_blocks; ++i) {
    const QueryBlock& block = args.blocks[i];
    queries = std::max(queries, block.end - block.begin);
    for (int64_t r = 0; r < block.num_ranges; ++r)
      keys = std::max(keys, block.ranges[r].end - block.ranges[r].begin);
  }
  ForwardMemory<Math> memory(sizes, queries, std::min(kKeys, keys));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / args.num_blocks;
    ForwardItem<Math>(args, sizes, memory, head / args.heads, head % args.heads,
                      args.blocks[item % args.num_blocks])
        .run();
  }
}

}  // namespace

void attention_forward(const AttentionArgs& args, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (args.q.element == Element::bfloat16) return forward<BFloat16>(args, begin, end);
#endif
  forward<Float32>(args, begin, end);
}

}  // namespace stream_r1::STREAM_R1_ISA
