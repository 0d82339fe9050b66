
#include "common/checks.h"
#include "cpu/region_saliency_kernel.h"
#include "cpu/tensors.h"

namespace stream_r1 {
namespace {

Tensor region_saliency_cpu(const Tensor& pixel_grads, int64_t frames, int64_t rows, int64_t columns) {
  check_pixel_grads(pixel_grads, frames, rows, columns);
  const Tensor grads = with_dense_rows(pixel_grads);
  const int64_t axes = grads.size(0), batch = grads.size(1), pixel_frames = grads.size(2);
  const int64_t height = grads.size(4), width = grads.size(5);
  Tensor out = allocate({axes, batch, frames, rows, columns}, kFloat, grads);
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
  parallel_for(
      0, bands, grain(grads.numel() / std::max<int64_t>(1, bands)),
      [&, kernel = pick_region_saliency()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace stream_r1

STREAM_R1_REGISTER(CPU, m) { m.impl("region_saliency", TORCH_BOX(&stream_r1::region_saliency_cpu)); }
