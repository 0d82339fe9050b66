#include "cpu/modulated_norm_kernel.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/rows.h"

namespace stream_r1::STREAM_R1_ISA {

void modulated_norm(const ModulatedNormArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  const std::unique_ptr<float[]> buffers(new float[4 * width]);
  float* const out_buffer = buffers.get() + width;
  int64_t current = -1;  // the frame whose shift and scale are at hand
  const float *shift = nullptr, *scale = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / args.tokens, token = row % args.tokens, frame = token / tokens_a_frame;
    if (batch * args.frames + frame != current) {
      current = batch * args.frames + frame;
      shift = read_row(args.shift, batch * args.shift_batch_stride + frame * args.shift_frame_stride, width,
                       buffers.get() + 2 * width);
      scale = read_row(args.scale, batch * args.scale_batch_stride + frame * args.scale_frame_stride, width,
                       buffers.get() + 3 * width);
    }
    const float* x =
        read_row(args.x, batch * args.x_batch_stride + token * args.x_token_stride, width, buffers.get());
    const float mean = sum_terms(width, [x](int64_t i) { return x[i]; }) / width;
    const float variance =
        sum_terms(width, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / width;
    const float rstd = 1 / std::sqrt(variance + args.eps);
    float* out = row_to_write(args.out, row * width, out_buffer);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * rstd * (1 + scale[i]) + shift[i];
    write_row(args.out, row * width, width, out);
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

void modulated_norm_backward(const ModulatedNormBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  const std::unique_ptr<float[]> buffers(new float[5 * width]);
  float* const factor = buffers.get() + 3 * width;  // 1 + scale
  float* const grad_x_buffer = buffers.get() + 4 * width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % args.blocks, frame = unit / args.blocks % args.frames,
                  batch = unit / args.blocks / args.frames;
    const float* scale = read_row(
        args.scale, batch * args.scale_batch_stride + frame * args.scale_frame_stride, width, buffers.get());
    for (int64_t i = 0; i < width; ++i) factor[i] = 1 + scale[i];
    float* const shift_sum = args.shift_sums + unit * width;
    float* const scale_sum = args.scale_sums + unit * width;
    std::fill_n(shift_sum, width, 0.f);
    std::fill_n(scale_sum, width, 0.f);
    const int64_t first = block * args.tokens_a_block;
    const int64_t last = std::min(first + args.tokens_a_block, tokens_a_frame);
    for (int64_t t = first; t < last; ++t) {
      const int64_t token = frame * tokens_a_frame + t, row = batch * args.tokens + token;
      const float* grad = read_row(args.grad_out, row * width, width, buffers.get() + width);
      const float* x = read_row(args.x, batch * args.x_batch_stride + token * args.x_token_stride, width,
                                buffers.get() + 2 * width);
      const float mean = args.mean[row], rstd = args.rstd[row];
      // With n = (x - mean) * rstd and u = grad * (1 + scale): grad_x = rstd * (u - mean(u) - n * mean(u *
      // n)).
      float u_sum = 0, un_sum = 0;
#pragma omp simd reduction(+ : u_sum, un_sum)
      for (int64_t i = 0; i < width; ++i) {
        const float n = (x[i] - mean) * rstd, g = grad[i];
        shift_sum[i] += g;
        scale_sum[i] += g * n;
        u_sum += g * factor[i];
        un_sum += g * factor[i] * n;
      }
      const float u_mean = u_sum / width, un_mean = un_sum / width;
      float* grad_x = row_to_write(args.grad_x, row * width, grad_x_buffer);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        grad_x[i] = rstd * (grad[i] * factor[i] - u_mean - (x[i] - mean) * rstd * un_mean);
      write_row(args.grad_x, row * width, width, grad_x);
    }
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
