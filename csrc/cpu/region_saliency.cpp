#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/region_saliency_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

using at::Tensor;

Tensor region_saliency_cpu(const Tensor& pixel_grads, int64_t frames, int64_t rows, int64_t columns) {
  check_pixel_grads(pixel_grads, frames, rows, columns);
  const Tensor grads = with_dense_rows(pixel_grads);
  const int64_t axes = grads.size(0), batch = grads.size(1), pixel_frames = grads.size(2);
  const int64_t height = grads.size(4), width = grads.size(5);
  Tensor out = at::empty({axes, batch, frames, rows, columns}, grads.options().dtype(at::kFloat));
  const RegionSaliencyArgs args{source(grads),
                                grads.stride(0),
                                grads.stride(1),
                                grads.stride(2),
                                grads.stride(3),
                                grads.stride(4),
                                out.mutable_data_ptr<float>(),
                                batch,
                                pixel_frames,
                                grads.size(3),
                                height,
                                width,
                                frames,
                                rows,
                                columns};
  const int64_t bands = axes * batch * frames * rows;
  at::parallel_for(
      0, bands, grain(grads.numel() / std::max<int64_t>(1, bands)),
      [&, kernel = pick_region_saliency()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace stream_r1

TORCH_LIBRARY_IMPL(stream_r1, CPU, m) { m.impl("region_saliency", stream_r1::region_saliency_cpu); }

TORCH_LIBRARY_IMPL(stream_r1, Autograd, m) {
  m.impl("region_saliency", torch::autograd::autogradNotImplementedFallback());
}
