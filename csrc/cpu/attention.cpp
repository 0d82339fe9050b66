// chunk_attention and cached_chunk_attention: allocation, the blocks of work, and registration on the CPU.
// The loops are in attention_{forward,backward}_kernel.cpp.

#include <numeric>
#include <set>

#include "common/checks.h"
#include "common/mask_table.h"
#include "cpu/attention_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

constexpr int64_t kSmallWork = 1 << 17;  // multiply-adds that one thread does faster alone than with help

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Blocks of queries, and the ranges that they point into.
struct Visible {
  std::vector<KeyRange> ranges;
  std::vector<QueryBlock> blocks;
};

// The same blocks, none longer than the kernel takes, and short enough that every thread finds some.
std::vector<QueryBlock> split(const std::vector<QueryBlock>& blocks, int64_t heads_in_all, int64_t queries) {
  const int64_t items_wanted = 4 * get_num_threads();
  const int64_t fair = (heads_in_all * queries + items_wanted - 1) / items_wanted;
  const int64_t longest =
      std::clamp<int64_t>((fair + kQueries - 1) / kQueries * kQueries, kQueries, kMostQueries);
  std::vector<QueryBlock> pieces;
  for (const QueryBlock& block : blocks) {
    // As long as each other, in whole tiles: every piece packs all of its keys, so a short last one is dear.
    const int64_t length = block.end - block.begin, count = (length + longest - 1) / longest;
    const int64_t fair_tiles = count == 0 ? 1 : (length + count * kQueries - 1) / (count * kQueries);
    for (int64_t begin = block.begin; begin < block.end; begin += fair_tiles * kQueries) {
      pieces.push_back(block);
      pieces.back().begin = begin;
      pieces.back().end = std::min(begin + fair_tiles * kQueries, block.end);
    }
  }
  return pieces;
}

int64_t pairs(const QueryBlock& block) {
  int64_t keys = 0;
  for (int64_t r = 0; r < block.num_ranges; ++r) keys += block.ranges[r].end - block.ranges[r].begin;
  return (block.end - block.begin) * keys;
}

int64_t pairs(const std::vector<QueryBlock>& blocks) {
  return std::accumulate(blocks.begin(), blocks.end(), int64_t{0},
                         [](int64_t total, const QueryBlock& block) { return total + pairs(block); });
}

// Runs kernel(begin, end) on ranges of the `groups` * costs.size() items, one a thread and all about as long;
// item i costs costs[i % costs.size()].
template <class Kernel>
void run_balanced(int64_t groups, const std::vector<int64_t>& costs, bool alone, const Kernel& kernel) {
  const int64_t period = static_cast<int64_t>(costs.size()), items = groups * period;
  const int64_t parts = alone ? 1 : std::min<int64_t>(get_num_threads(), items);
  if (parts <= 1) return kernel(0, items);
  std::vector<double> before(period + 1, 0.0);  // the cost of a group's items before each
  for (int64_t i = 0; i < period; ++i) before[i + 1] = before[i] + static_cast<double>(costs[i]);
  const double group = before[period];
  // The first item that starts at or after a share of the whole.
  const auto boundary = [&](int64_t part) {
    if (part == parts) return items;
    if (group == 0.0) return items * part / parts;
    const double share =
        group * static_cast<double>(groups) * static_cast<double>(part) / static_cast<double>(parts);
    const int64_t whole = std::min(static_cast<int64_t>(share / group), groups - 1);
    const double rest = share - group * static_cast<double>(whole);
    return whole * period + (std::lower_bound(before.begin(), before.end() - 1, rest) - before.begin());
  };
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      if (boundary(part) < boundary(part + 1)) kernel(boundary(part), boundary(part + 1));
  });
}

// Tensors that the arguments of a kernel point into; kept alive while it runs.
struct Prepared {
  Tensor q;
  OptionalTensor k[2], v[2];  // 0: the past, 1: the fresh keys
  AttentionArgs args{};
};

void set_keys(const char* op, Prepared& p, int source_index, const Tensor& k, const Tensor& v) {
  check_keys(op, p.q, k, v);
  const Tensor& dense_k = p.k[source_index].emplace(with_dense_rows(k));
  const Tensor& dense_v = p.v[source_index].emplace(with_dense_rows(v));
  p.args.keys[source_index] = {source(dense_k), source(dense_v), strides_of(dense_k), strides_of(dense_v)};
}

Prepared prepare(const char* op, const Tensor& q, double scale) {
  check_queries(op, q);
  Prepared p{with_dense_rows(q), {}, {}};
  p.args.heads = q.size(2);
  p.args.head_dim = q.size(3);
  p.args.queries = q.size(1);
  p.args.scale = static_cast<float>(scale);
  p.args.q = source(p.q);
  p.args.q_strides = strides_of(p.q);
  p.args.brgemm = pick_brgemm();
  return p;
}

std::tuple<Tensor, Tensor> forward(Prepared& p, const Visible& visible) {
  const std::vector<QueryBlock>& blocks = visible.blocks;
  const Tensor& q = p.q;
  Tensor out = allocate(q.sizes(), q);
  Tensor lse = allocate({q.size(0), q.size(2), q.size(1)}, kDouble, q);
  const int64_t heads_in_all = q.size(0) * q.size(2);
  if (out.numel() == 0) return {out, torch::stable::fill_(lse, -std::numeric_limits<double>::infinity())};
  const std::vector<QueryBlock> pieces = split(blocks, heads_in_all, q.size(1));
  p.args.blocks = pieces.data();
  p.args.num_blocks = static_cast<int64_t>(pieces.size());
  p.args.out = target(out);
  p.args.out_strides = strides_of(out);
  p.args.lse = lse.mutable_data_ptr<double>();
  std::vector<int64_t> costs;
  for (const QueryBlock& piece : pieces) costs.push_back(pairs(piece) + piece.end - piece.begin);
  auto* kernel = pick_attention_forward();
  const bool small = heads_in_all * pairs(blocks) * q.size(3) < kSmallWork;
  run_balanced(heads_in_all, costs, small, [&](int64_t begin, int64_t end) {
    kernel(p.args, begin, end);
    release_brgemm();
  });
  return {out, lse};
}

// Tiles of keys, such that a block of queries sees the whole of a tile or none of it.
std::vector<KeyTile> key_tiles(const std::vector<QueryBlock>& blocks, int64_t fresh) {
  std::vector<KeyTile> tiles;
  for (int source : {0, 1}) {
    std::set<int64_t> cuts;
    for (const QueryBlock& block : blocks)
      for (int64_t r = 0; r < block.num_ranges; ++r)
        if (block.ranges[r].source == source) cuts.insert({block.ranges[r].begin, block.ranges[r].end});
    if (source == 1) cuts.insert({0, fresh});  // every fresh key has a gradient, be it zero
    for (auto cut = cuts.begin(); cut != cuts.end() && std::next(cut) != cuts.end(); ++cut) {
      const int64_t end = *std::next(cut), count = (end - *cut + kBackwardKeys - 1) / kBackwardKeys;
      const int64_t step = (end - *cut + count - 1) / count;
      for (int64_t begin = *cut; begin < end; begin += step)
        tiles.push_back({source, begin, std::min(begin + step, end)});
    }
  }
  return tiles;
}

std::tuple<Tensor, Tensor, Tensor> backward(Prepared& p, const Visible& visible, const Tensor& grad_any,
                                            const OptionalTensor& grad_lse_any, const Tensor& out_any,
                                            const Tensor& lse_any) {
  const std::vector<QueryBlock>& blocks = visible.blocks;
  const Tensor &q = p.q, &k = *p.k[1];
  check_shape("attention backward", "grad_out", grad_any, "q", q);
  check_shape("attention backward", "out", out_any, "q", q);
  check_dtype("attention backward", "out", out_any, "q", q);
  check_sizes("attention backward", "lse", lse_any, {q.size(0), q.size(2), q.size(1)});
  if (grad_lse_any.has_value()) check_shape("attention backward", "grad_lse", *grad_lse_any, "lse", lse_any);
  Tensor grad_k = allocate(k.sizes(), k), grad_v = allocate(k.sizes(), k);
  const int64_t heads_in_all = q.size(0) * q.size(2);
  if (heads_in_all * q.size(3) == 0)
    return {allocate_zeros(q.sizes(), dtype_of(q), q), torch::stable::zero_(grad_k),
            torch::stable::zero_(grad_v)};
  const std::vector<KeyTile> tiles = key_tiles(blocks, k.size(1));
  const bool small = heads_in_all * pairs(blocks) * q.size(3) < kSmallWork;
  // Fewer heads than threads: the key tiles of a head are dealt out too, and what each part adds to the
  // gradient of the queries is summed at the end.
  const int64_t splits = small || tiles.empty()
                             ? 1
                             : std::clamp<int64_t>((get_num_threads() + heads_in_all - 1) / heads_in_all, 1,
                                                   static_cast<int64_t>(tiles.size()));
  Tensor grad_q = splits == 1 ? allocate(q.sizes(), q)
                              : allocate({splits, q.size(0), q.size(1), q.size(2), q.size(3)}, kFloat, q);
  const Tensor out = with_dense_rows(out_any), grad = with_dense_rows(to_dtype(grad_any, dtype_of(q))),
               lse = without_gaps(to_dtype(lse_any, kDouble));
  OptionalTensor grad_lse;
  if (grad_lse_any.has_value()) grad_lse = contiguous_float(*grad_lse_any);
  AttentionBackwardArgs args{};
  args.forward = p.args;
  args.forward.blocks = blocks.data();
  args.forward.num_blocks = static_cast<int64_t>(blocks.size());
  args.forward.lse = const_cast<double*>(lse.const_data_ptr<double>());
  args.out = source(out);
  args.out_strides = strides_of(out);
  args.grad_out = source(grad);
  args.grad_out_strides = strides_of(grad);
  args.grad_lse = grad_lse.has_value() ? grad_lse->const_data_ptr<float>() : nullptr;
  args.grad_q = target(grad_q);
  args.grad_k = target(grad_k);
  args.grad_v = target(grad_v);
  args.batch = q.size(0);
  args.fresh = k.size(1);
  args.tiles = tiles.data();
  args.num_tiles = static_cast<int64_t>(tiles.size());
  args.splits = splits;
  auto* kernel = pick_attention_backward();
  run_balanced(heads_in_all, std::vector<int64_t>(splits, 1), small, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
    release_brgemm();
  });
  if (splits > 1) grad_q = to_dtype(torch::stable::sum(grad_q, Sizes({0})), dtype_of(q));
  return {grad_q, grad_k, grad_v};
}

// All queries see all keys: [past | fresh].
Visible dense_block(const Prepared& p) {
  Visible visible;
  for (int i = 0; i < 2; ++i)
    if (p.k[i].has_value() && p.k[i]->size(1) > 0) visible.ranges.push_back({i, 0, p.k[i]->size(1)});
  visible.blocks.push_back(
      {0, p.q.size(1), visible.ranges.data(), static_cast<int64_t>(visible.ranges.size())});
  return visible;
}

Prepared prepare_cached(const Tensor& q, const OptionalTensor& k, const OptionalTensor& v,
                        const OptionalTensor& past_k, const OptionalTensor& past_v, double scale) {
  const char* op = "cached_chunk_attention";
  check_segments(op, k, v, past_k, past_v);
  Prepared p = prepare(op, q, scale);
  if (past_k.has_value()) set_keys(op, p, 0, *past_k, *past_v);
  if (k.has_value()) set_keys(op, p, 1, *k, *v);
  return p;
}

std::tuple<Tensor, Tensor> cached_chunk_attention(const Tensor& q, const OptionalTensor& k,
                                                  const OptionalTensor& v, const OptionalTensor& past_k,
                                                  const OptionalTensor& past_v, double scale) {
  Prepared p = prepare_cached(q, k, v, past_k, past_v, scale);
  return forward(p, dense_block(p));
}

std::tuple<Tensor, Tensor, Tensor> cached_chunk_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& past_k, const OptionalTensor& past_v, const Tensor& out, const Tensor& lse,
    double scale) {
  Prepared p = prepare_cached(q, k, v, past_k, past_v, scale);
  return backward(p, dense_block(p), grad_out, grad_lse, out, lse);
}

Visible masked_blocks(const std::vector<int64_t>& table, const Tensor& q) {
  const MaskTable mask = checked_table(table, q.size(1));
  Visible visible;
  visible.ranges.reserve(mask.blocks * mask.ranges);  // so that what points into it stays
  visible.blocks.reserve(mask.blocks);
  for (int64_t block = 0; block < mask.blocks; ++block) {
    const int64_t* row = mask.row(block);
    const KeyRange* first = visible.ranges.data() + visible.ranges.size();
    for_ranges(mask, row, [&](int64_t begin, int64_t end) { visible.ranges.push_back({1, begin, end}); });
    visible.blocks.push_back({row[0], row[1], first, visible.ranges.data() + visible.ranges.size() - first});
  }
  return visible;
}

Prepared prepare_chunks(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Prepared p = prepare("chunk_attention", q, scale);
  STREAM_R1_CHECK(k.dim() == 4 && k.size(1) == q.size(1), "chunk_attention: k: expected ", q.sizes(),
                  " as q, got ", k.sizes());
  set_keys("chunk_attention", p, 1, k, v);
  return p;
}

std::tuple<Tensor, Tensor> chunk_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           std::vector<int64_t> table, double scale) {
  Prepared p = prepare_chunks(q, k, v, scale);
  return forward(p, masked_blocks(table, q));
}

std::tuple<Tensor, Tensor, Tensor> chunk_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                            const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& lse,
                                                            std::vector<int64_t> table, double scale) {
  Prepared p = prepare_chunks(q, k, v, scale);
  return backward(p, masked_blocks(table, q), grad_out, std::nullopt, out, lse);
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) {
  m.impl("cached_chunk_attention", TORCH_BOX(&stream_r1::cached_chunk_attention));
  m.impl("cached_chunk_attention_backward", TORCH_BOX(&stream_r1::cached_chunk_attention_backward));
  m.impl("chunk_attention", TORCH_BOX(&stream_r1::chunk_attention));
  m.impl("chunk_attention_backward", TORCH_BOX(&stream_r1::chunk_attention_backward));
}
