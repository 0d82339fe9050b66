#include "cpu/region_saliency_kernel.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/rows.h"

namespace stream_r1::STREAM_R1_ISA {

void region_saliency(const RegionSaliencyArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, cell_height = args.height / args.rows, cell_width = width / args.columns;
  const int64_t factor = args.frames == 1 ? 0 : (args.pixel_frames - 1) / (args.frames - 1);
  const std::unique_ptr<float[]> buffers(new float[5 * width]);
  float *const sums = buffers.get(), *const squares = sums + width, *const converted = squares + width;
  for (int64_t band = begin; band < end; ++band) {
    const int64_t row = band % args.rows, frame = band / args.rows % args.frames,
                  sample = band / args.rows / args.frames;
    const int64_t first = frame == 0 ? 0 : 1 + factor * (frame - 1), pixel_frames = frame == 0 ? 1 : factor;
    const int64_t corner = sample / args.batch * args.axis_stride + sample % args.batch * args.batch_stride +
                           first * args.frame_stride + row * cell_height * args.row_stride;
    std::fill_n(sums, width, 0.f);
    for (int64_t line = 0; line < pixel_frames * cell_height; ++line) {
      const int64_t offset =
          corner + line / cell_height * args.frame_stride + line % cell_height * args.row_stride;
      const auto channel = [&](int64_t c) {
        return read_row(args.grads, offset + c * args.channel_stride, width, converted + c % 3 * width);
      };
      if (args.channels == 3) {
        const float *red = channel(0), *green = channel(1), *blue = channel(2);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
          sums[i] += std::sqrt(red[i] * red[i] + green[i] * green[i] + blue[i] * blue[i]);
        continue;
      }
      std::fill_n(squares, width, 0.f);
      for (int64_t c = 0; c < args.channels; ++c) {
        const float* values = channel(c);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) squares[i] += values[i] * values[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sums[i] += std::sqrt(squares[i]);
    }
    const float share = 1.f / static_cast<float>(pixel_frames * cell_height * cell_width);
    for (int64_t column = 0; column < args.columns; ++column) {
      float total = 0;
      for (int64_t i = 0; i < cell_width; ++i) total += sums[column * cell_width + i];
      args.out[band * args.columns + column] = total * share;
    }
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
