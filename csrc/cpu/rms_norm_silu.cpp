
#include "common/checks.h"
#include "cpu/rms_norm_silu_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

Tensor norm(const Tensor& x_, const Tensor& weight_, const OptionalTensor& before_, double eps, bool silu) {
  const int64_t batch = x_.size(0), tokens = x_.size(1), width = x_.size(2);
  const Tensor x = with_dense_rows(x_), weight = contiguous_float(weight_);
  const Tensor before = before_ ? with_dense_rows(*before_) : x;  // of x none is read
  const int64_t leading = before_ ? before.size(1) : 0;
  Tensor out = allocate({batch, leading + tokens, width}, x);
  const RmsNormSiluArgs args{source(x),
                             x.stride(0),
                             x.stride(1),
                             weight.const_data_ptr<float>(),
                             source(before),
                             before.stride(0),
                             before.stride(1),
                             target(out),
                             goes_past_cache(out),
                             leading,
                             tokens,
                             width,
                             static_cast<float>(eps),
                             silu};
  parallel_for(0, batch * out.size(1), grain(width),
               [&, kernel = pick_rms_norm_silu()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor rms_norm_silu_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& before, double eps) {
  check_rms_norm_silu(x, weight, before);
  return norm(x, weight, before, eps, true);
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm("rms_norm", x, weight);
  return norm(x, weight, std::nullopt, eps, false);
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) {
  m.impl("rms_norm_silu", TORCH_BOX(&stream_r1::rms_norm_silu_cpu));
  m.impl("rms_norm", TORCH_BOX(&stream_r1::rms_norm_cpu));
}
