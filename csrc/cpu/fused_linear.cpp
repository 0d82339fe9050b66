// fused_linear: checks, allocation, the units of work and registration. The loops are in
// fused_linear_kernel.cpp.

#include "common/checks.h"
#include "cpu/fused_linear_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using Layers = std::vector<Tensor>;

constexpr int64_t kLinearAlone = 1 << 18;  // multiply-adds that one thread does faster alone than with help
// Of x, which every panel of a block reads again: from the last cache; the block's sums from the one below.
constexpr int64_t kBlockBytes = 4 << 20;

void check_layers(const Tensor& x, const Layers& weights, const Layers& biases) {
  STREAM_R1_CHECK(x.dim() == 3 && x.size(2) > 0, "fused_linear: x: expected shape [B, T, K > 0], got ",
                  x.sizes());
  STREAM_R1_CHECK(!weights.empty() && (biases.empty() || biases.size() == weights.size()),
                  "fused_linear: biases: expected none or ", weights.size(), ", got ", biases.size());
  for (const Tensor& weight : weights) {
    STREAM_R1_CHECK(weight.dim() == 2 && weight.size(1) == x.size(2),
                    "fused_linear: weights: expected shape [N, ", x.size(2), "], got ", weight.sizes());
    check_dtype("fused_linear", "weights", weight, "x", x);
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    STREAM_R1_CHECK(biases[i].dim() == 1 && biases[i].size(0) == weights[i].size(0),
                    "fused_linear: biases: expected shape [", weights[i].size(0), "], got ",
                    biases[i].sizes());
  }
}

Tensor fused_linear_cpu(const Tensor& x_, const Layers& weights_, const Layers& biases_, bool gelu,
                        const OptionalTensor& residual_, const OptionalTensor& gate_) {
  check_layers(x_, weights_, biases_);
  const Tensor x = without_gaps(x_);
  const int64_t batch = x.size(0), tokens = x.size(1), depth = x.size(2), rows = batch * tokens;
  std::vector<Tensor> kept;  // alive while the kernel runs
  kept.reserve(2 * weights_.size() + 2);
  std::vector<LinearLayer> layers;
  layers.reserve(weights_.size());
  int64_t width = 0, panels = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Tensor& weight = kept.emplace_back(with_dense_rows(weights_[i]));
    LinearLayer layer{source(weight), weight.stride(0), {}, weight.size(0), width};
    if (!biases_.empty()) layer.bias = source(kept.emplace_back(without_gaps(biases_[i])));
    panels += linear_panels(layer);
    width += layer.columns;
    layers.push_back(layer);
  }
  Tensor out = allocate({batch, tokens, width}, x);
  FusedLinearArgs args{};
  if (residual_) {
    check_shape("fused_linear", "residual", *residual_, "out", out);
    check_dtype("fused_linear", "residual", *residual_, "x", x);
    args.residual = source(kept.emplace_back(without_gaps(*residual_)));
    args.residual_stride = width;
  }
  args.tokens_a_frame = tokens;
  args.frames = 1;
  if (gate_) {
    STREAM_R1_CHECK(residual_, "fused_linear: gate: expected none without a residual");
    check_per_frame("fused_linear", "gate", *gate_, out);
    const Tensor& gate = kept.emplace_back(with_dense_rows(*gate_));
    args.gate = source(gate);
    args.gate_batch_stride = gate.stride(0);
    args.gate_frame_stride = gate.stride(1);
    args.frames = gate.size(1);
    args.tokens_a_frame = tokens / gate.size(1);
  }
  if (out.numel() == 0) return out;
  args.x = source(x);
  args.x_stride = depth;
  args.rows = rows;
  args.depth = depth;
  args.layers = layers.data();
  args.num_layers = static_cast<int64_t>(layers.size());
  args.gelu = gelu;
  args.out = target(out);
  args.width = width;
  const int64_t item = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(x).code));
  const int64_t most_groups = std::clamp<int64_t>(kBlockBytes / (depth * item * kLinearRows), 64, 200);
  const int64_t groups = (rows + kLinearRows - 1) / kLinearRows,
                blocks = (groups + most_groups - 1) / most_groups;
  args.block_rows = (groups + blocks - 1) / blocks * kLinearRows;
  args.brgemm = pick_brgemm();
  const int64_t unit_work = std::max<int64_t>(1, kLinearRows * depth * kLinearColumns);
  parallel_for(0, panels * groups, std::max<int64_t>(1, kLinearAlone / unit_work),
               [&, kernel = pick_fused_linear()](int64_t begin, int64_t end) {
                 kernel(args, begin, end);
                 release_brgemm();
               });
  return out;
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) { m.impl("fused_linear", TORCH_BOX(&stream_r1::fused_linear_cpu)); }
