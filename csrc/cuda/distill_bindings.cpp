// dmd_loss, dmd_gradient_, region_saliency and intra_weights on CUDA: checks, allocation and registration.

#include "common/checks.h"
#include "cuda/dmd.h"
#include "cuda/saliency.h"
#include "cuda/tensors.h"

namespace stream_r1::cuda {
namespace {

constexpr int64_t kBlockElements = 16384;

// The arguments of both passes, and what they point into.
struct Dmd {
  Tensor x, fake, real_cond, real_uncond;
  OptionalTensor w_intra, w_inter, mask, sums;
  DmdArgs args{};

  Dmd(const Tensor& x_, const Tensor& fake_, const Tensor& real_cond_, const OptionalTensor& real_uncond_,
      double guidance, const OptionalTensor& w_intra_, const OptionalTensor& w_inter_,
      const OptionalTensor& mask_)
      : x(with_dense_rows(x_, 2)),
        fake(with_dense_rows(fake_, 2)),
        real_cond(with_dense_rows(real_cond_, 2)),
        real_uncond(with_dense_rows(real_uncond_.value_or(real_cond_), 2)) {
    check_predictions(x_, fake_, real_cond_, real_uncond_, w_inter_);
    for (const Tensor& other : {fake_, real_cond_, real_uncond_.value_or(real_cond_)})
      check_dtype("dmd", "fake, real_cond, real_uncond", other, "x", x);

    args.x = x.const_data_ptr(), args.x_planes = planes(x);
    args.fake = fake.const_data_ptr(), args.fake_planes = planes(fake);
    args.real_cond = real_cond.const_data_ptr(), args.real_cond_planes = planes(real_cond);
    args.real_uncond = real_uncond.const_data_ptr(), args.real_uncond_planes = planes(real_uncond);
    args.guidance = real_uncond_.has_value() ? static_cast<float>(guidance) : 0.f;
    args.element = element_of(x);
    args.batch = x.size(0), args.frames = x.size(1), args.channels = x.size(2);
    args.plane = x.size(3) * x.size(4);
    // Kept elements are counted in float32, exactly up to 2^24 in a block.
    STREAM_R1_CHECK(args.plane <= int64_t{1} << 24, "dmd: x: expected at most 2^24 cells a frame, got ",
                    args.plane);
    if (w_intra_.has_value()) {
      w_intra = whole_planes(to_dtype(*w_intra_, kFloat), x, &args.w_intra_varies);
      args.w_intra = w_intra->const_data_ptr<float>(), args.w_intra_planes = planes(*w_intra);
    }
    if (mask_.has_value()) {
      mask = whole_planes(*mask_, x, &args.mask_varies);
      args.mask = mask->const_data_ptr<bool>(), args.mask_planes = planes(*mask);
    }
    if (w_inter_.has_value()) {
      w_inter = contiguous_float(*w_inter_);
      args.w_inter = w_inter->const_data_ptr<float>();
    }
    args.planes_a_block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, args.plane));
    args.blocks = (args.frames * args.channels + args.planes_a_block - 1) / args.planes_a_block;
    sums = allocate({4, args.batch, args.blocks}, kFloat, x);
    args.distances = sums->mutable_data_ptr<float>();
    args.kept = args.distances + args.batch * args.blocks;
    args.heaviest = args.kept + args.batch * args.blocks;
    args.squares = args.heaviest + args.batch * args.blocks;
  }
};

std::tuple<Tensor, Tensor, Tensor> dmd_loss(const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                                            const OptionalTensor& real_uncond, double guidance,
                                            const OptionalTensor& w_intra, const OptionalTensor& w_inter,
                                            const OptionalTensor& mask) {
  const OnDevice device(x);
  Dmd dmd(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  Tensor direction = allocate(x.sizes(), x);
  Tensor factor = allocate({dmd.args.batch}, kFloat, x), loss = allocate({}, kFloat, x);
  dmd.args.direction = direction.mutable_data_ptr();
  dmd.args.direction_planes = planes(direction);
  dmd.args.direction_element = dmd.args.element;
  dmd.args.factor = factor.mutable_data_ptr<float>();
  dmd.args.loss = loss.mutable_data_ptr<float>();
  check_launch("dmd_loss", launch_dmd_loss(dmd.args, device.stream));
  return {loss, direction, factor};
}

Tensor dmd_loss_backward(const Tensor& grad_loss_, const Tensor& direction_, const Tensor& factor_) {
  STREAM_R1_CHECK(direction_.dim() == 5 && grad_loss_.numel() == 1,
                  "dmd_loss_backward: expected one grad_loss and direction [B, F, C, h, w], got shapes ",
                  grad_loss_.sizes(), " and ", direction_.sizes());
  check_sizes("dmd_loss_backward", "factor", factor_, {direction_.size(0)});
  const OnDevice device(direction_);
  const Tensor direction = without_gaps(direction_), factor = without_gaps(factor_),
               grad_loss = to_dtype(grad_loss_, kFloat);
  Tensor grad = allocate(direction.sizes(), direction);
  const int64_t batch = direction.size(0), n = batch == 0 ? 0 : direction.numel() / batch;
  check_launch("dmd_loss_backward",
               launch_dmd_scale({direction.const_data_ptr(), factor.const_data_ptr<float>(),
                                 grad_loss.const_data_ptr<float>(), grad.mutable_data_ptr(), batch, n,
                                 element_of(direction)},
                                device.stream));
  return grad;
}

void dmd_gradient_(Tensor buffer, const Tensor& x, const Tensor& fake, const Tensor& real_cond,
                   const OptionalTensor& real_uncond, double guidance, const OptionalTensor& w_intra,
                   const OptionalTensor& w_inter, const OptionalTensor& mask, double scale) {
  check_gradient_buffer(buffer, x, fake, real_cond, real_uncond, w_intra, w_inter, mask);
  STREAM_R1_CHECK(dtype_of(buffer) == dtype_of(x) || dtype_of(buffer) == kFloat,
                  "dmd_gradient_: buffer: expected ", dtype_of(x), " as x, or float32, got ",
                  dtype_of(buffer));
  const OnDevice device(x);
  Dmd dmd(x, fake, real_cond, real_uncond, guidance, w_intra, w_inter, mask);
  Tensor dense = with_dense_rows(buffer, 2);
  dmd.args.direction = dense.mutable_data_ptr();
  dmd.args.direction_planes = planes(dense);
  dmd.args.direction_element = element_of(dense);
  dmd.args.scale = static_cast<float>(scale);
  check_launch("dmd_gradient_", launch_dmd_gradient(dmd.args, device.stream));
  if (dense.get() != buffer.get()) torch::stable::copy_(buffer, dense);
}

Tensor region_saliency(const Tensor& pixel_grads, int64_t frames, int64_t rows, int64_t columns) {
  const char* op = "region_saliency";
  check_pixel_grads(pixel_grads, frames, rows, columns);
  const OnDevice device(pixel_grads);
  const Tensor grads = with_dense_rows(pixel_grads);
  const int64_t pixel_frames = grads.size(2), height = grads.size(4), width = grads.size(5);
  STREAM_R1_CHECK(width <= kMostPixels, op, ": pixel_grads: expected at most ", kMostPixels,
                  " columns on CUDA, got ", width);
  Tensor out = allocate({grads.size(0), grads.size(1), frames, rows, columns}, kFloat, grads);
  const RegionSaliencyArgs args{grads.const_data_ptr(),
                                grads.stride(0),
                                grads.stride(1),
                                grads.stride(2),
                                grads.stride(3),
                                grads.stride(4),
                                out.mutable_data_ptr<float>(),
                                grads.size(0),
                                grads.size(1),
                                pixel_frames,
                                grads.size(3),
                                height,
                                width,
                                frames,
                                rows,
                                columns,
                                element_of(grads)};
  check_launch(op, launch_region_saliency(args, device.stream));
  return out;
}

Tensor intra_weights(const Tensor& saliency_, const Tensor& scores_, double temperature, double spatial_floor,
                     double temporal_floor, double spatial_strength, double temporal_strength,
                     bool use_spatial, bool use_temporal) {
  const char* op = "intra_weights";
  check_saliency(saliency_, scores_);
  const int64_t axes = saliency_.size(0), batch = saliency_.size(1), frames = saliency_.size(2),
                rows = saliency_.size(3), columns = saliency_.size(4);
  const OnDevice device(saliency_);
  const Tensor saliency = contiguous_float(saliency_), scores = contiguous_float(scores_);
  Tensor weights = allocate({batch, frames, 1, rows, columns}, saliency);
  Tensor sums = allocate({2, batch, frames}, saliency);
  const IntraWeightsArgs args{saliency.const_data_ptr<float>(),
                              scores.const_data_ptr<float>(),
                              weights.mutable_data_ptr<float>(),
                              sums.mutable_data_ptr<float>(),
                              sums.mutable_data_ptr<float>() + batch * frames,
                              axes,
                              batch,
                              frames,
                              rows * columns,
                              static_cast<float>(temperature),
                              static_cast<float>(spatial_floor),
                              static_cast<float>(temporal_floor),
                              static_cast<float>(spatial_strength),
                              static_cast<float>(temporal_strength),
                              use_spatial,
                              use_temporal};
  check_launch(op, launch_intra_weights(args, device.stream));
  return weights;
}

}  // namespace
}  // namespace stream_r1::cuda

STREAM_R1_REGISTER(STREAM_R1_CUDA_KEY, m) {
  m.impl("dmd_loss", TORCH_BOX(&stream_r1::cuda::dmd_loss));
  m.impl("dmd_loss_backward", TORCH_BOX(&stream_r1::cuda::dmd_loss_backward));
  m.impl("dmd_gradient_", TORCH_BOX(&stream_r1::cuda::dmd_gradient_));
  m.impl("region_saliency", TORCH_BOX(&stream_r1::cuda::region_saliency));
  m.impl("intra_weights", TORCH_BOX(&stream_r1::cuda::intra_weights));
}
