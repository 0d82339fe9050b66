
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "common/checks.h"
#include "cpu/dmd_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

constexpr int64_t kBlockElements = 16384;

// The arguments of both passes and what keeps their memory alive.
struct Job {
  Tensor x, fake, real_cond, real_uncond;
  OptionalTensor w_intra, mask;
  std::vector<DmdBlock> blocks;
  std::vector<float> inverse_scale;
  DmdArgs args{};

  int64_t batch() const { return x.size(0); }
  int64_t units() const { return x.size(0) * args.blocks; }
  std::span<const DmdBlock> sample(int64_t b) const {
    return std::span(blocks).subspan(b * args.blocks, args.blocks);
  }
  int64_t block_grain() const { return grain(4 * args.planes_a_block * args.plane); }
};

Job prepare(const Tensor& x, const Tensor& fake, const Tensor& real_cond, const OptionalTensor& real_uncond,
            double guidance, const OptionalTensor& w_intra, const OptionalTensor& w_inter,
            const OptionalTensor& mask) {
  check_predictions(x, fake, real_cond, real_uncond, w_inter);
  Job job{with_dense_rows(x, 2), with_dense_rows(fake, 2), with_dense_rows(real_cond, 2),
          with_dense_rows(real_uncond.value_or(real_cond), 2)};
  DmdArgs& args = job.args;
  args.x = source(job.x), args.x_planes = planes(job.x);
  args.fake = source(job.fake), args.fake_planes = planes(job.fake);
  args.real_cond = source(job.real_cond), args.real_cond_planes = planes(job.real_cond);
  args.real_uncond = source(job.real_uncond), args.real_uncond_planes = planes(job.real_uncond);
  args.guidance = real_uncond.has_value() ? static_cast<float>(guidance) : 0.f;
  if (w_intra.has_value()) {
    job.w_intra = whole_planes(to_dtype(*w_intra, kFloat), x, &args.w_intra_varies);
    args.w_intra = job.w_intra->const_data_ptr<float>();
    args.w_intra_planes = planes(*job.w_intra);
  }
  if (mask.has_value()) {
    job.mask = whole_planes(*mask, x, &args.mask_varies);
    args.mask = job.mask->const_data_ptr<bool>();
    args.mask_planes = planes(*job.mask);
  }
  args.frames = x.size(1), args.channels = x.size(2), args.plane = x.size(3) * x.size(4);
  const int64_t sample_planes = args.frames * args.channels;
  args.planes_a_block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, args.plane));
  args.blocks = (sample_planes + args.planes_a_block - 1) / args.planes_a_block;
  return job;
}

// First pass: the normaliser of g, and [B] the factor of each sample's direction w_intra * g in the gradient:
// w_inter / (B * kept). A sample that keeps nothing has a direction of 0.
std::vector<double> measure(Job& job, const OptionalTensor& w_inter) {
  DmdArgs& args = job.args;
  job.blocks.resize(job.units());
  job.inverse_scale.resize(job.batch());
  args.blocks_out = job.blocks.data();
  args.inverse_scale = job.inverse_scale.data();
  parallel_for(0, job.units(), job.block_grain(),
               [&, kernel = pick_dmd_measure()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  OptionalTensor inter;
  if (w_inter.has_value()) inter = contiguous_float(*w_inter);
  std::vector<double> factors(job.batch());
  const double elements = static_cast<double>(args.frames * args.channels * args.plane);
  for (int64_t b = 0; b < job.batch(); ++b) {
    double distance = 0;
    int64_t kept = 0;
    for (const DmdBlock& block : job.sample(b)) distance += block.distance, kept += block.kept;
    const float inverse = static_cast<float>(elements / distance);
    job.inverse_scale[b] = inverse <= FLT_MAX ? inverse : 0;  // all of g counts as 0
    const double weight = inter.has_value() ? inter->const_data_ptr<float>()[b] : 1.0;
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
  parallel_for(
      0, job.units(), job.block_grain(),
      [&, kernel = pick_dmd_directions()](int64_t begin, int64_t end) { kernel(job.args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> dmd_loss_cpu(const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                                                const OptionalTensor& real_uncond, double guidance,
                                                const OptionalTensor& w_intra, const OptionalTensor& w_inter,
                                                const OptionalTensor& mask) {
  Job job = prepare(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  Tensor direction = allocate(x.sizes(), x);
  job.args.direction = target(direction);
  job.args.direction_planes = planes(direction);
  const std::vector<double> factors = measure(job, w_inter);
  const bool late = normalises_late(job);
  const std::vector<float> shrink = late ? std::vector<float>() : shrinkages(job);
  if (!late) second_pass(job, shrink);
  Tensor factor = allocate({job.batch()}, kFloat, x);
  Tensor loss = allocate({}, factor);
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
  const Tensor direction = without_gaps(direction_);
  const Tensor outer = contiguous_float(grad_loss), inner = contiguous_float(factor_);
  STREAM_R1_CHECK(outer.numel() == 1, "dmd_loss_backward: grad_loss: expected one value, got shape ",
                  grad_loss.sizes());
  STREAM_R1_CHECK(direction.dim() == 5, "dmd_loss_backward: direction: expected shape [B, F, C, h, w], got ",
                  direction.sizes());
  const int64_t batch = direction.size(0);
  check_sizes("dmd_loss_backward", "factor", factor_, {batch});
  std::vector<float> factor(inner.const_data_ptr<float>(), inner.const_data_ptr<float>() + batch);
  for (float& value : factor) value *= *outer.const_data_ptr<float>();
  const int64_t n = batch == 0 ? 0 : direction.numel() / batch;
  Tensor grad = allocate(direction.sizes(), direction);
  const int64_t blocks = (n + kBlockElements - 1) / kBlockElements;
  const DmdScaleArgs args{source(direction), factor.data(), target(grad), n, blocks, kBlockElements};
  parallel_for(0, batch * blocks, grain(kBlockElements),
               [&, kernel = pick_dmd_scale()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return grad;
}

void dmd_gradient_cpu(Tensor buffer, const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                      const OptionalTensor& real_uncond, double guidance, const OptionalTensor& w_intra,
                      const OptionalTensor& w_inter, const OptionalTensor& mask, double scale) {
  check_gradient_buffer(buffer, x, fake, real_cond, real_uncond, w_intra, w_inter, mask);
  Job job = prepare(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  std::vector<float> factor;
  for (double value : measure(job, w_inter)) factor.push_back(static_cast<float>(value * scale));
  const Tensor dense = with_dense_rows(buffer, 2);
  job.args.adds = true;
  job.args.direction = target(dense);
  job.args.direction_planes = planes(dense);
  second_pass(job, factor);
  if (dense.get() != buffer.get()) torch::stable::copy_(buffer, dense);
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) {
  m.impl("dmd_loss", TORCH_BOX(&stream_r1::dmd_loss_cpu));
  m.impl("dmd_loss_backward", TORCH_BOX(&stream_r1::dmd_loss_backward_cpu));
  m.impl("dmd_gradient_", TORCH_BOX(&stream_r1::dmd_gradient_cpu));
}
