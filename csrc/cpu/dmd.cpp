#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/dmd_kernel.h"
#include "cpu/registered.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;

constexpr int64_t kBlockElements = 16384;

// The arguments of both passes and what keeps their memory alive.
struct Job {
  Tensor x, fake, real_cond, real_uncond, w_intra, mask;
  std::vector<DmdBlock> blocks;
  std::vector<float> inverse_scale;
  DmdArgs args{};

  int64_t batch() const { return x.size(0); }
  int64_t units() const { return x.size(0) * args.blocks; }
  c10::ArrayRef<DmdBlock> sample(int64_t b) const {
    return c10::ArrayRef<DmdBlock>(blocks).slice(b * args.blocks, args.blocks);
  }
  int64_t block_grain() const { return grain(4 * args.planes_a_block * args.plane); }
};

void prepare(Job& job, const Tensor& x, const Tensor& fake, const Tensor& real_cond,
             const std::optional<Tensor>& real_uncond, double guidance, const std::optional<Tensor>& w_intra,
             const std::optional<Tensor>& w_inter, const std::optional<Tensor>& mask) {
  check_predictions(x, fake, real_cond, real_uncond, w_inter);
  job.x = with_dense_rows(x, 2);
  job.fake = with_dense_rows(fake, 2);
  job.real_cond = with_dense_rows(real_cond, 2);
  job.real_uncond = real_uncond.has_value() ? with_dense_rows(*real_uncond, 2) : job.real_cond;
  DmdArgs& args = job.args;
  args.x = source(job.x), args.x_planes = planes(job.x);
  args.fake = source(job.fake), args.fake_planes = planes(job.fake);
  args.real_cond = source(job.real_cond), args.real_cond_planes = planes(job.real_cond);
  args.real_uncond = source(job.real_uncond), args.real_uncond_planes = planes(job.real_uncond);
  args.guidance = real_uncond.has_value() ? static_cast<float>(guidance) : 0.f;
  if (w_intra.has_value()) {
    job.w_intra = whole_planes(w_intra->to(at::kFloat), x, &args.w_intra_varies);
    args.w_intra = job.w_intra.const_data_ptr<float>();
    args.w_intra_planes = planes(job.w_intra);
  }
  if (mask.has_value()) {
    job.mask = whole_planes(*mask, x, &args.mask_varies);
    args.mask = job.mask.const_data_ptr<bool>();
    args.mask_planes = planes(job.mask);
  }
  args.frames = x.size(1), args.channels = x.size(2), args.plane = x.size(3) * x.size(4);
  const int64_t sample_planes = args.frames * args.channels;
  args.planes_a_block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, args.plane));
  args.blocks = (sample_planes + args.planes_a_block - 1) / args.planes_a_block;
}

// First pass: the normaliser of g, and [B] the factor of each sample's direction w_intra * g in the gradient:
// w_inter / (B * kept). A sample that keeps nothing has a direction of 0.
std::vector<double> measure(Job& job, const std::optional<Tensor>& w_inter) {
  DmdArgs& args = job.args;
  job.blocks.resize(job.units());
  job.inverse_scale.resize(job.batch());
  args.blocks_out = job.blocks.data();
  args.inverse_scale = job.inverse_scale.data();
  at::parallel_for(
      0, job.units(), job.block_grain(),
      [&, kernel = pick_dmd_measure()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  Tensor inter;
  if (w_inter.has_value()) inter = contiguous_float(*w_inter);
  std::vector<double> factors(job.batch());
  const double elements = static_cast<double>(args.frames * args.channels * args.plane);
  for (int64_t b = 0; b < job.batch(); ++b) {
    double distance = 0;
    int64_t kept = 0;
    for (const DmdBlock& block : job.sample(b)) distance += block.distance, kept += block.kept;
    const float inverse = static_cast<float>(elements / distance);
    job.inverse_scale[b] = inverse <= FLT_MAX ? inverse : 0;  // all of g counts as 0
    const double weight = inter.defined() ? inter.const_data_ptr<float>()[b] : 1.0;
    factors[b] = weight / (static_cast<double>(job.batch()) * std::max<int64_t>(kept, 1));
  }
  return factors;
}

// The first pass leaves w_intra * (fake - real), which the normaliser turns into w_intra * g by its place in
// the factor: that saves a pass over memory. It will not do where g or a product on the way leaves the range
// of its type although the inputs do not; such calls take the second pass.
bool normalises_late(const Job& job) {
  const bool half = job.args.x.element == Element::float16;
  for (int64_t b = 0; b < job.batch(); ++b) {
    const float inverse = job.inverse_scale[b];
    if (inverse == 0 || inverse > (half ? 1e3f : 1e30f)) return false;
    float largest = 0, heaviest = 0;
    for (const DmdBlock& block : job.sample(b)) {
      largest = std::max(largest, block.largest);
      heaviest = std::max(heaviest, block.heaviest);
    }
    const bool tame = largest == 0 || (largest >= 1e-12f && largest <= 1e12f && largest * inverse <= 1e30f &&
                                       heaviest <= (half ? 3e4f : 1e30f));
    if (!tame) return false;
  }
  return true;
}

// Powers of two, [B], times which w_intra * g is about 1 at most: as it is, it may leave the range of a
// 16-bit type although its product with the factor does not.
std::vector<float> shrinkages(const Job& job) {
  std::vector<float> shrink(job.batch(), 1.f);
  for (int64_t b = 0; b < job.batch(); ++b) {
    double heaviest = 0;
    for (const DmdBlock& block : job.sample(b)) heaviest = std::max<double>(heaviest, block.heaviest);
    heaviest *= job.inverse_scale[b];
    if (heaviest > 0 && heaviest <= DBL_MAX)
      shrink[b] = std::ldexp(1.f, 14 - std::clamp(std::ilogb(heaviest), -60, 60));
  }
  return shrink;
}

// `factor`: [B], of the direction.
void second_pass(Job& job, const std::vector<float>& factor) {
  job.args.factor = factor.data();
  at::parallel_for(
      0, job.units(), job.block_grain(),
      [&, kernel = pick_dmd_directions()](int64_t begin, int64_t end) { kernel(job.args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> dmd_loss_cpu(const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                                                const std::optional<Tensor>& real_uncond, double guidance,
                                                const std::optional<Tensor>& w_intra,
                                                const std::optional<Tensor>& w_inter,
                                                const std::optional<Tensor>& mask) {
  Job job;
  prepare(job, x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  Tensor direction = at::empty(x.sizes(), x.options());
  job.args.direction = target(direction);
  job.args.direction_planes = planes(direction);
  const std::vector<double> factors = measure(job, w_inter);
  const bool late = normalises_late(job);
  const std::vector<float> shrink = late ? std::vector<float>() : shrinkages(job);
  if (!late) second_pass(job, shrink);
  Tensor factor = at::empty({job.batch()}, x.options().dtype(at::kFloat));
  Tensor loss = at::empty({}, factor.options());
  double total = 0;
  for (int64_t b = 0; b < job.batch(); ++b) {
    const double inverse = job.inverse_scale[b];
    double squares = 0;
    for (const DmdBlock& block : job.sample(b)) squares += block.squares;
    total += 0.5 * factors[b] * squares * (late ? inverse * inverse : 1);
    factor.mutable_data_ptr<float>()[b] = static_cast<float>(factors[b] * (late ? inverse : 1 / shrink[b]));
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return {loss, direction, factor};
}

Tensor dmd_loss_backward_cpu(const Tensor& grad_loss, const Tensor& direction_, const Tensor& factor_) {
  const Tensor direction = direction_.contiguous();
  const Tensor outer = contiguous_float(grad_loss), inner = contiguous_float(factor_);
  TORCH_CHECK_VALUE(outer.numel() == 1, "dmd_loss_backward: grad_loss: expected one value, got shape ",
                    grad_loss.sizes());
  TORCH_CHECK_VALUE(direction.dim() == 5,
                    "dmd_loss_backward: direction: expected shape [B, F, C, h, w], got ", direction.sizes());
  const int64_t batch = direction.size(0);
  check_sizes("dmd_loss_backward", "factor", factor_, {batch});
  std::vector<float> factor(inner.const_data_ptr<float>(), inner.const_data_ptr<float>() + batch);
  for (float& value : factor) value *= *outer.const_data_ptr<float>();
  const int64_t n = batch == 0 ? 0 : direction.numel() / batch;
  Tensor grad = at::empty(direction.sizes(), direction.options());
  const int64_t blocks = (n + kBlockElements - 1) / kBlockElements;
  const DmdScaleArgs args{source(direction), factor.data(), target(grad), n, blocks, kBlockElements};
  at::parallel_for(0, batch * blocks, grain(kBlockElements),
                   [&, kernel = pick_dmd_scale()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return grad;
}

void dmd_gradient_cpu(Tensor buffer, const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                      const std::optional<Tensor>& real_uncond, double guidance,
                      const std::optional<Tensor>& w_intra, const std::optional<Tensor>& w_inter,
                      const std::optional<Tensor>& mask, double scale) {
  check_gradient_buffer(buffer, x, fake, real_cond, real_uncond, w_intra, w_inter, mask);
  Job job;
  prepare(job, x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  std::vector<float> factor;
  for (double value : measure(job, w_inter)) factor.push_back(static_cast<float>(value * scale));
  const Tensor dense = with_dense_rows(buffer, 2);
  job.args.adds = true;
  job.args.direction = target(dense);
  job.args.direction_planes = planes(dense);
  second_pass(job, factor);
  if (!dense.is_same(buffer)) buffer.copy_(dense);
}

std::tuple<Tensor, Tensor, Tensor> loss_below_autograd(const Tensor& x, const Tensor& fake,
                                                       const Tensor& real_cond,
                                                       const std::optional<Tensor>& real_uncond,
                                                       double guidance, const std::optional<Tensor>& w_intra,
                                                       const std::optional<Tensor>& w_inter,
                                                       const std::optional<Tensor>& mask) {
  static const auto op = registered<decltype(dmd_loss_cpu)>("stream_r1::dmd_loss");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
}

// The gradient as a tensor whose own derivative by x raises. No input of the graph is saved: autograd would
// take it for a constant.
Tensor without_derivative(const Tensor& grad) {
  if (!at::GradMode::is_enabled()) return grad;
  const Tensor refusing = grad.detach();
  torch::autograd::set_history(
      refusing, c10::make_intrusive<torch::autograd::Error>(
                    "dmd_loss: the derivative of its gradient is not implemented; backend='reference' has it",
                    torch::autograd::edge_list{torch::autograd::get_current_node()->next_edge(0)}));
  return refusing;
}

struct DmdLoss : torch::autograd::Function<DmdLoss> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& x,
                                                const Tensor& fake, const Tensor& real_cond,
                                                const std::optional<Tensor>& real_uncond, double guidance,
                                                const std::optional<Tensor>& w_intra,
                                                const std::optional<Tensor>& w_inter,
                                                const std::optional<Tensor>& mask) {
    auto [loss, direction, factor] =
        loss_below_autograd(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
    context->save_for_backward({direction, factor});
    context->mark_non_differentiable({direction, factor});
    return {loss, direction, factor};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = registered<decltype(dmd_loss_backward_cpu)>("stream_r1::dmd_loss_backward");
    const auto saved = context->get_saved_variables();
    torch::autograd::variable_list result(8);
    result[0] = without_derivative(op.call(grads[0], saved[0], saved[1]));
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> dmd_loss_autograd(const Tensor& x, const Tensor& fake,
                                                     const Tensor& real_cond,
                                                     const std::optional<Tensor>& real_uncond,
                                                     double guidance, const std::optional<Tensor>& w_intra,
                                                     const std::optional<Tensor>& w_inter,
                                                     const std::optional<Tensor>& mask) {
  if (!needs_graph({x}))
    return loss_below_autograd(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  const auto results = DmdLoss::apply(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  return {results[0], results[1], results[2]};
}

// The gradient is a constant: x may require grad.
void dmd_gradient_autograd(Tensor buffer, const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                           const std::optional<Tensor>& real_uncond, double guidance,
                           const std::optional<Tensor>& w_intra, const std::optional<Tensor>& w_inter,
                           const std::optional<Tensor>& mask, double scale) {
  static const auto op = registered<decltype(dmd_gradient_cpu)>("stream_r1::dmd_gradient_");
  const at::AutoDispatchBelowAutograd below;
  op.call(buffer, x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask, scale);
  torch::autograd::impl::bump_version(buffer);
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, CPU, m) {
  m.impl("dmd_loss", stream_r1::dmd_loss_cpu);
  m.impl("dmd_loss_backward", stream_r1::dmd_loss_backward_cpu);
  m.impl("dmd_gradient_", stream_r1::dmd_gradient_cpu);
}

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) {
  m.impl("dmd_loss", stream_r1::dmd_loss_autograd);
  m.impl("dmd_loss_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("dmd_gradient_", stream_r1::dmd_gradient_autograd);
}
