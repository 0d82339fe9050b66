// The attention ops on CUDA: checks, allocation and registration. Their backward is torch's matrix products,
// in Python (stream_r1_kernels/attention/cuda_backward.py).

#include <map>
#include <mutex>

#include "common/checks.h"
#include "common/mask_table.h"
#include "cuda/attention.h"
#include "cuda/tensors.h"

namespace stream_r1::cuda {
namespace {

// The tensor with rows of `width` elements, padded with zeros, that start at multiples of 16 bytes; itself if
// they do already.
Tensor with_tensor_core_rows(const Tensor& x, int64_t width) {
  if (x.size(3) != width) return without_gaps(torch::stable::pad(x, Sizes({0, width - x.size(3)})));
  if (x.stride(3) != 1 && x.numel() != 0) return without_gaps(x);
  if (rows_are_aligned(x)) return x;
  Tensor copy = allocate(x.sizes(), x);
  torch::stable::copy_(copy, x);
  return copy;
}

HeadStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Tensors that the arguments of a launch point into; kept alive until it is queued.
struct Prepared {
  Tensor q;
  OptionalTensor k[2], v[2];
  AttentionArgs args{};
};

Prepared prepare(const char* op, const Tensor& q, double scale) {
  check_queries(op, q);
  STREAM_R1_CHECK(dtype_of(q) == kBFloat16 || dtype_of(q) == kHalf, op,
                  ": q: expected bfloat16 or float16 on CUDA, got ", dtype_of(q));
  STREAM_R1_CHECK(q.size(3) <= 128, op, ": q: expected heads of at most 128 channels on CUDA, got ",
                  q.size(3));
  const int64_t width = q.size(3) <= 64 ? 64 : 128;
  Prepared p{with_tensor_core_rows(q, width), {}, {}};
  p.args.head_dim = width;
  p.args.q = p.q.const_data_ptr();
  p.args.q_strides = strides_of(p.q);
  p.args.batch = static_cast<int32_t>(q.size(0));
  p.args.queries = static_cast<int32_t>(q.size(1));
  p.args.heads = static_cast<int32_t>(q.size(2));
  p.args.scale = static_cast<float>(scale);
  p.args.is_bfloat16 = dtype_of(q) == kBFloat16;
  p.args.splits = 1;
  return p;
}

void set_keys(Prepared& p, int segment, const Tensor& k, const Tensor& v) {
  const Tensor& rows_k = p.k[segment].emplace(with_tensor_core_rows(k, p.args.head_dim));
  const Tensor& rows_v = p.v[segment].emplace(with_tensor_core_rows(v, p.args.head_dim));
  p.args.segments[segment] = {rows_k.const_data_ptr(), rows_v.const_data_ptr(), strides_of(rows_k),
                              strides_of(rows_v), k.size(1)};
}

std::tuple<Tensor, Tensor> run(const char* op, Prepared& p, int64_t head_dim) {
  const OnDevice device(p.q);
  AttentionArgs& args = p.args;
  Tensor out = allocate({args.batch, args.queries, args.heads, args.head_dim}, p.q);
  Tensor lse = allocate({args.batch, args.heads, args.queries}, kFloat, p.q);
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  Device properties;
  check_launch(op, current_device(properties));
  args.splits = attention_splits(args, properties.processors);
  OptionalTensor partial_out, partial_rows;  // kept until the launch is queued
  if (args.splits > 1) {
    partial_out = allocate({args.splits, args.batch, args.queries, args.heads, args.head_dim}, kFloat, p.q);
    partial_rows = allocate({2, args.splits, args.batch, args.heads, args.queries}, kFloat, p.q);
    args.partial_out = partial_out->mutable_data_ptr<float>();
    args.partial_maximum = partial_rows->mutable_data_ptr<float>();
    args.partial_sum = args.partial_maximum + partial_rows->numel() / 2;
  }
  check_launch(op, launch_attention(args, device.stream));
  return {head_dim == args.head_dim ? out : without_gaps(torch::stable::narrow(out, 3, 0, head_dim)), lse};
}

std::tuple<Tensor, Tensor> cached_chunk_attention(const Tensor& q, const OptionalTensor& k,
                                                  const OptionalTensor& v, const OptionalTensor& past_k,
                                                  const OptionalTensor& past_v, double scale) {
  const char* op = "cached_chunk_attention";
  check_segments(op, k, v, past_k, past_v);
  Prepared p = prepare(op, q, scale);
  if (past_k.has_value()) {
    check_keys(op, q, *past_k, *past_v);
    set_keys(p, 0, *past_k, *past_v);
  }
  if (k.has_value()) {
    check_keys(op, q, *k, *v);
    set_keys(p, 1, *k, *v);
  }
  return run(op, p, q.size(3));
}

// The rows that the kernels take (AttentionArgs::table), [blocks, 3 + 2 * ranges], on a tensor's device:
// copied there at the first call and never freed, as captured graphs and other streams may read them.
Tensor device_table(const std::vector<int64_t>& numbers, const Tensor& q) {
  using Kept = std::map<std::pair<int32_t, std::vector<int64_t>>, Tensor>;
  static std::mutex mutex;
  static Kept& kept = *new Kept;  // which outlives the runtime that it would be freed by
  const std::lock_guard lock(mutex);
  const auto key = std::make_pair(q.get_device_index(), numbers);
  if (const auto found = kept.find(key); found != kept.end()) return found->second;

  const MaskTable mask = checked_table(numbers, q.size(1));
  std::vector<int32_t> rows;
  for (int64_t block = 0; block < mask.blocks; ++block) {
    const int64_t* row = mask.row(block);
    int64_t tiles = 0;
    for_ranges(mask, row,
               [&](int64_t begin, int64_t end) { tiles += (end - begin + kTileKeys - 1) / kTileKeys; });
    for (int64_t begin = row[0]; begin < row[1]; begin += kBlockQueries) {
      for (int64_t number : {begin, std::min(begin + kBlockQueries, row[1]), tiles})
        rows.push_back(static_cast<int32_t>(number));
      for (int64_t i = 0; i < 2 * mask.ranges; ++i) rows.push_back(static_cast<int32_t>(row[2 + i]));
    }
  }
  const int64_t width = 3 + 2 * mask.ranges, sizes[] = {static_cast<int64_t>(rows.size()) / width, width},
                strides[] = {width, 1};
  AtenTensorHandle host = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      rows.data(), 2, sizes, strides, 0, kInt.code, aoti_torch_device_type_cpu(), 0, &host));
  Tensor table = allocate(sizes, kInt, q);
  torch::stable::copy_(table, Tensor(host));
  return kept.emplace(key, table).first->second;
}

std::tuple<Tensor, Tensor> chunk_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           std::vector<int64_t> numbers, double scale) {
  const char* op = "chunk_attention";
  Prepared p = prepare(op, q, scale);
  check_keys(op, q, k, v);
  check_shape(op, "k", k, "q", q);
  set_keys(p, 1, k, v);
  const Tensor table = device_table(numbers, q);
  p.args.table = table.const_data_ptr<int32_t>();
  p.args.blocks = static_cast<int32_t>(table.size(0));
  p.args.ranges = static_cast<int32_t>((table.size(1) - 3) / 2);
  return run(op, p, q.size(3));
}

}  // namespace
}  // namespace stream_r1::cuda

STREAM_R1_REGISTER(STREAM_R1_CUDA_KEY, m) {
  m.impl("cached_chunk_attention", TORCH_BOX(&stream_r1::cuda::cached_chunk_attention));
  m.impl("chunk_attention", TORCH_BOX(&stream_r1::cuda::chunk_attention));
}
