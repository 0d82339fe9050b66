
#include "common/checks.h"
#include "cpu/modulated_norm_kernel.h"
#include "cpu/per_frame.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

std::tuple<Tensor, Tensor, Tensor> modulated_norm_cpu(const Tensor& x_, const Tensor& shift_,
                                                      const Tensor& scale_, double eps) {
  check_norm_modulation("modulated_norm", x_, shift_, scale_);
  const Tensor x = with_dense_rows(x_), shift = with_dense_rows(shift_), scale = with_dense_rows(scale_);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  Tensor out = allocate({batch, tokens, width}, x);
  Tensor mean = allocate({batch, tokens}, kFloat, x), rstd = allocate({batch, tokens}, kFloat, x);
  const ModulatedNormArgs args{source(x),
                               x.stride(0),
                               x.stride(1),
                               source(shift),
                               source(scale),
                               shift.stride(0),
                               shift.stride(1),
                               scale.stride(0),
                               scale.stride(1),
                               target(out),
                               goes_past_cache(out),
                               mean.mutable_data_ptr<float>(),
                               rstd.mutable_data_ptr<float>(),
                               tokens,
                               shift.size(1),
                               width,
                               static_cast<float>(eps)};
  parallel_for(0, batch * tokens, grain(width),
               [&, kernel = pick_modulated_norm()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward_cpu(const Tensor& grad_out_, const Tensor& x_,
                                                               const Tensor& scale_, const Tensor& mean_,
                                                               const Tensor& rstd_) {
  check_per_frame("modulated_norm_backward", "scale", scale_, x_);
  check_shape("modulated_norm_backward", "grad_out", grad_out_, "x", x_);
  check_sizes("modulated_norm_backward", "mean", mean_, {x_.size(0), x_.size(1)});
  check_sizes("modulated_norm_backward", "rstd", rstd_, {x_.size(0), x_.size(1)});
  const Tensor grad_out = without_gaps(grad_out_), x = with_dense_rows(x_), scale = with_dense_rows(scale_);
  const Tensor mean = without_gaps(mean_), rstd = without_gaps(rstd_);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), frames = scale.size(1);
  const FrameBlocks split(tokens / frames);
  Tensor grad_x = allocate({batch, tokens, width}, x);
  Tensor shift_sums = allocate({batch, frames, split.blocks, width}, kFloat, x);
  Tensor scale_sums = allocate(shift_sums.sizes(), kFloat, x);
  const ModulatedNormBackwardArgs args{source(grad_out),
                                       source(x),
                                       x.stride(0),
                                       x.stride(1),
                                       source(scale),
                                       scale.stride(0),
                                       scale.stride(1),
                                       mean.const_data_ptr<float>(),
                                       rstd.const_data_ptr<float>(),
                                       target(grad_x),
                                       goes_past_cache(grad_x),
                                       shift_sums.mutable_data_ptr<float>(),
                                       scale_sums.mutable_data_ptr<float>(),
                                       tokens,
                                       frames,
                                       width,
                                       split.blocks,
                                       split.tokens_a_block};
  parallel_for(
      0, batch * frames * split.blocks, grain(width * split.tokens_a_block),
      [&, kernel = pick_modulated_norm_backward()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grad_x, sum_blocks(shift_sums, dtype_of(scale)), sum_blocks(scale_sums, dtype_of(scale))};
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) {
  m.impl("modulated_norm", TORCH_BOX(&stream_r1::modulated_norm_cpu));
  m.impl("modulated_norm_backward", TORCH_BOX(&stream_r1::modulated_norm_backward_cpu));
}
