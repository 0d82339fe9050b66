// The backward of attention, one tile of keys after the other against every tile of queries that sees it.
// Scores and their gradients are kept transposed, [keys, queries], as in the forward, and so are the
// gradients of queries, [head, queries].

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention_kernel.h"
#include "cpu/attention_pack.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct QueryTile {
  int64_t block, begin, end;
};

// Scratch of the backward of one head.
template <class Math>
struct BackwardMemory {
  BackwardMemory(const HeadSizes<Math>& sizes, int64_t tiles, int64_t most_keys)
      : key_words(round_up(words_of<Math>(most_keys), kLanes)),
        queries_t(tiles * sizes.words * kQueries),
        grads_t(tiles * sizes.words * kQueries),
        queries(tiles * words_of<Math>(kQueries) * sizes.width),
        grads(tiles * words_of<Math>(kQueries) * sizes.width),
        grad_queries(tiles * sizes.width * kQueries),
        lse(tiles * kQueries),
        lse_rest(tiles * kQueries),
        delta(tiles * kQueries),
        staging(std::max(most_keys, kQueries) * sizes.row),
        by_token(words_of<Math>(most_keys) * sizes.width),
        keys(most_keys * sizes.row),
        values(most_keys * sizes.row),
        keys_t(sizes.width * key_words),
        weights(most_keys * kQueries),
        grad_scores(most_keys * kQueries),
        weight_rows(most_keys * kQueries),
        grad_rows(most_keys * kQueries),
        grad_keys(most_keys * sizes.width),
        grad_values(most_keys * sizes.width),
        row(std::max(sizes.width, kQueries * sizes.width)) {}

  int64_t key_words;
  Scratch queries_t, grads_t;  // [tiles, head words, kQueries], of queries and of the gradient of the output
  Scratch queries, grads;      // [tiles, query words, width]
  Scratch grad_queries;        // [tiles, width, kQueries]
  Scratch lse, lse_rest, delta;  // [tiles, kQueries]; lse is of powers of two, and has a rest below its unit

  Scratch staging, by_token;
  Scratch keys, values;            // [keys, row words]
  Scratch keys_t;                  // [width, key words]
  Scratch weights, grad_scores;    // [keys, kQueries]; then grad_scores as words along the keys
  Scratch weight_rows, grad_rows;  // [keys, query words]
  Scratch grad_keys, grad_values;  // [keys, width]
  Scratch row;                     // [kQueries, width]
};

// weights = 2^(factor * scores - lse - rest) and grad_scores = weights * (grad_weights - delta), [n, wide]:
// both as words along the queries, and grad_scores also as words along the keys, in place.
template <class Math>
[[gnu::noinline]] void softmax_backward(int64_t n, int64_t wide, float factor, const float* lse,
                                        const float* rest, const float* delta, const float* scores,
                                        float* grad_scores, float* weight_rows, float* grad_rows) {
  constexpr int64_t kWords = kQueries / Math::kPerWord;
  for (int64_t j = 0; j < wide; j += kLanes) {
    const Vec lse_j = load(lse + j), rest_j = load(rest + j), delta_j = load(delta + j);
    for (int64_t i = 0; i < n; i += Math::kPerWord) {
      Vec grads[Math::kPerWord] = {};
      for (int64_t u = 0; u < Math::kPerWord && i + u < n; ++u) {
        const Vec above = multiply_subtract(load(scores + (i + u) * kQueries + j), factor, lse_j);
        const Vec weight = exp2(above - rest_j);
        grads[u] = weight * (load(grad_scores + (i + u) * kQueries + j) - delta_j);
        Math::store_row(weight_rows + (i + u) * kWords + j / Math::kPerWord, weight);
        if (Math::kPerWord > 1) Math::store_row(grad_rows + (i + u) * kWords + j / Math::kPerWord, grads[u]);
      }
      store(grad_scores + i / Math::kPerWord * kQueries + j, Math::join(grads));
    }
  }
}

template <class Math>
class BackwardHead {
 public:
  BackwardHead(const AttentionBackwardArgs& args, const HeadSizes<Math>& sizes, BackwardMemory<Math>& memory,
               const std::vector<QueryTile>& tiles, int64_t b, int64_t h)
      : args_(args),
        a_(args.forward),
        sizes_(sizes),
        m_(memory),
        tiles_(tiles),
        b_(b),
        h_(h),
        scale_(args.forward.scale) {}

  void run(int64_t split) {
    for (int64_t tile = 0; tile < num_tiles(); ++tile) read_queries(tile);
    for (int64_t i = split; i < args_.num_tiles; i += args_.splits) add_keys(args_.tiles[i]);
    for (int64_t tile = 0; tile < num_tiles(); ++tile) write_queries(tile, split);
  }

 private:
  int64_t num_tiles() const { return static_cast<int64_t>(tiles_.size()); }
  int64_t count(int64_t tile) const { return tiles_[tile].end - tiles_[tile].begin; }
  int64_t transposed(int64_t tile) const { return tile * sizes_.words * kQueries; }
  int64_t by_token(int64_t tile) const { return tile * words_of<Math>(kQueries) * sizes_.width; }
  float* grad_queries(int64_t tile) { return m_.grad_queries + tile * sizes_.width * kQueries; }

  void pack_queries(int64_t tile, const Source& source, const Strides& strides, float* columns,
                    float* tokens) {
    pack_rows({source, strides, b_, h_, tiles_[tile].begin, count(tile)}, sizes_, m_.staging);
    transpose(m_.staging, count(tile), sizes_.words, sizes_.row, columns, kQueries);
    const float* packed = pack_by_token(m_.staging, count(tile), sizes_, tokens);
    if (packed != tokens) std::copy_n(packed, count(tile) * sizes_.width, tokens);
  }

  // Packs a tile, and reads lse and delta = sum_d grad_out * out - grad_lse, such that padding has no weight.
  // The sum is made as the products with values are: where one key has all of the weight, the two cancel
  // exactly.
  void read_queries(int64_t tile) {
    pack_queries(tile, a_.q, a_.q_strides, m_.queries_t + transposed(tile), m_.queries + by_token(tile));
    pack_queries(tile, args_.grad_out, args_.grad_out_strides, m_.grads_t + transposed(tile),
                 m_.grads + by_token(tile));
    std::fill_n(grad_queries(tile), sizes_.width * kQueries, 0.0f);
    float* lse = m_.lse + tile * kQueries;
    float* rest = m_.lse_rest + tile * kQueries;
    float* delta = m_.delta + tile * kQueries;
    std::fill_n(lse, kQueries, kInfinity);
    std::fill_n(rest, kQueries, 0.0f);
    std::fill_n(delta, kQueries, 0.0f);
    const int64_t line = (b_ * a_.heads + h_) * a_.queries + tiles_[tile].begin;
    pack_rows({args_.out, args_.out_strides, b_, h_, tiles_[tile].begin, count(tile)}, sizes_, m_.staging);
    float* const outs_t = m_.row;
    transpose(m_.staging, count(tile), sizes_.words, sizes_.row, outs_t, kQueries);
    for (int64_t j = 0; j < count(tile); j += kLanes) {
      Vec sum = {};
      for (int64_t k = 0; k < sizes_.words; ++k)
        sum = Math::multiply_add(sum, load(outs_t + k * kQueries + j),
                                 load(m_.grads_t + transposed(tile) + k * kQueries + j));
      store(delta + j, sum);
    }
    for (int64_t i = 0; i < count(tile); ++i) {
      const double whole = a_.lse[line + i] / scale_.ln2;
      if (std::isfinite(whole)) {
        lse[i] = static_cast<float>(whole);
        rest[i] = static_cast<float>(whole - lse[i]);
      } else if (whole > 0 || std::isnan(whole)) {  // a score of +inf; of -inf alone: no key has a weight
        lse[i] = std::numeric_limits<float>::quiet_NaN();
      }
      if (args_.grad_lse != nullptr) delta[i] -= args_.grad_lse[line + i];
    }
  }

  bool sees(const QueryBlock& block, const KeyTile& keys) const {
    for (int64_t r = 0; r < block.num_ranges; ++r)
      if (block.ranges[r].source == keys.source && block.ranges[r].begin <= keys.begin &&
          keys.end <= block.ranges[r].end)
        return true;
    return false;
  }

  void add_keys(const KeyTile& keys) {
    const Keys& from = a_.keys[keys.source];
    const int64_t seen = keys.end - keys.begin;
    pack_rows({from.k, from.k_strides, b_, h_, keys.begin, seen}, sizes_, m_.keys);
    pack_rows({from.v, from.v_strides, b_, h_, keys.begin, seen}, sizes_, m_.values);
    transpose(pack_by_token(m_.keys, seen, sizes_, m_.by_token), words_of<Math>(seen), sizes_.head_dim,
              sizes_.width, m_.keys_t, m_.key_words);
    const bool fresh = keys.source == 1;
    if (fresh) {
      std::fill_n(m_.grad_keys + 0, seen * sizes_.width, 0.0f);
      std::fill_n(m_.grad_values + 0, seen * sizes_.width, 0.0f);
    }
    for (int64_t tile = 0; tile < num_tiles(); ++tile)
      if (sees(a_.blocks[tiles_[tile].block], keys)) add_tile(tile, seen, fresh);
    if (fresh) {
      for (int64_t i = 0; i < seen; ++i) {
        const int64_t offset = ((b_ * args_.fresh + keys.begin + i) * a_.heads + h_) * sizes_.head_dim;
        write(m_.grad_keys + i * sizes_.width, a_.scale, args_.grad_k, offset);
        write(m_.grad_values + i * sizes_.width, 1.0f, args_.grad_v, offset);
      }
    }
  }

  void add_tile(int64_t tile, int64_t seen, bool fresh) {
    constexpr int64_t kWords = kQueries / Math::kPerWord;
    const int64_t wide = round_up(count(tile), kLanes), words = words_of<Math>(count(tile));
    product<Math>(a_.brgemm, seen, wide, sizes_.words, m_.keys, sizes_.row, m_.queries_t + transposed(tile),
                  kQueries, {Start::zero}, m_.weights, kQueries);
    product<Math>(a_.brgemm, seen, wide, sizes_.words, m_.values, sizes_.row, m_.grads_t + transposed(tile),
                  kQueries, {Start::zero}, m_.grad_scores, kQueries);
    softmax_backward<Math>(seen, wide, scale_.factor, m_.lse + tile * kQueries, m_.lse_rest + tile * kQueries,
                           m_.delta + tile * kQueries, m_.weights, m_.grad_scores, m_.weight_rows,
                           m_.grad_rows);
    product<Math>(a_.brgemm, sizes_.head_dim, wide, words_of<Math>(seen), m_.keys_t, m_.key_words,
                  m_.grad_scores, kQueries, {Start::there}, grad_queries(tile), kQueries);
    if (!fresh) return;
    const float* grad_rows = Math::kPerWord > 1 ? m_.grad_rows : m_.grad_scores;
    product<Math>(a_.brgemm, seen, sizes_.width, words, m_.weight_rows, kWords, m_.grads + by_token(tile),
                  sizes_.width, {Start::there}, m_.grad_values, sizes_.width);
    product<Math>(a_.brgemm, seen, sizes_.width, words, grad_rows, kWords, m_.queries + by_token(tile),
                  sizes_.width, {Start::there}, m_.grad_keys, sizes_.width);
  }

  void write_queries(int64_t tile, int64_t split) {
    transpose(grad_queries(tile), sizes_.head_dim, count(tile), kQueries, m_.row, sizes_.width);
    for (int64_t i = 0; i < count(tile); ++i) {
      const int64_t token = (split * args_.batch + b_) * a_.queries + tiles_[tile].begin + i;
      write(m_.row + i * sizes_.width, a_.scale, args_.grad_q, (token * a_.heads + h_) * sizes_.head_dim);
    }
  }

  void write(float* row, float factor, const Target& to, int64_t offset) {
    for (int64_t d = 0; d < sizes_.head_dim; ++d) row[d] *= factor;
    float* out = row_to_write(to, offset, row);
    if (out != row) std::memcpy(out, row, static_cast<size_t>(sizes_.head_dim) * 4);
    write_row(to, offset, sizes_.head_dim, row);
  }

  const AttentionBackwardArgs& args_;
  const AttentionArgs& a_;
  const HeadSizes<Math>& sizes_;
  BackwardMemory<Math>& m_;
  const std::vector<QueryTile>& tiles_;
  int64_t b_, h_;
  BinaryScale scale_;
};

template <class Math>
void backward(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.forward;
  std::vector<QueryTile> tiles;
  for (int64_t i = 0; i < a.num_blocks; ++i)
    for (int64_t first = a.blocks[i].begin; first < a.blocks[i].end; first += kQueries)
      tiles.push_back({i, first, std::min(first + kQueries, a.blocks[i].end)});
  const HeadSizes<Math> sizes(a.head_dim);
  BackwardMemory<Math> memory(sizes, static_cast<int64_t>(tiles.size()), kBackwardKeys);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / args.splits;
    BackwardHead<Math>(args, sizes, memory, tiles, head / a.heads, head % a.heads).run(item % args.splits);
  }
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (args.forward.q.element == Element::bfloat16) return backward<BFloat16>(args, begin, end);
#endif
  backward<Float32>(args, begin, end);
}

}  // namespace stream_r1::STREAM_R1_ISA
