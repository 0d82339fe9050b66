#include "cpu/gated_add_kernel.h"

#include <algorithm>
#include <memory>

#include "cpu/rows.h"

namespace stream_r1::STREAM_R1_ISA {

void gated_add(const GatedAddArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  const std::unique_ptr<float[]> buffers(new float[4 * width]);
  float *const x_buffer = buffers.get(), *const y_buffer = x_buffer + width,
               *const gate_buffer = y_buffer + width, *const out_buffer = gate_buffer + width;
  int64_t current = -1;  // the frame whose gate is at hand
  const float* gate = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / args.tokens, token = row % args.tokens, frame = token / tokens_a_frame;
    if (batch * args.frames + frame != current) {
      current = batch * args.frames + frame;
      gate = read_row(args.gate, batch * args.gate_batch_stride + frame * args.gate_frame_stride, width,
                      gate_buffer);
    }
    const float* x =
        read_row(args.x, batch * args.x_batch_stride + token * args.x_token_stride, width, x_buffer);
    const float* y =
        read_row(args.y, batch * args.y_batch_stride + token * args.y_token_stride, width, y_buffer);
    float* out = row_to_write(args.out, row * width, out_buffer);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] + y[i] * gate[i];
    write_row(args.out, row * width, width, out);
  }
}

void gated_add_backward(const GatedAddBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  const std::unique_ptr<float[]> buffers(new float[4 * width]);
  float *const grad_buffer = buffers.get(), *const y_buffer = grad_buffer + width,
               *const gate_buffer = y_buffer + width, *const grad_y_buffer = gate_buffer + width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % args.blocks, frame = unit / args.blocks % args.frames,
                  batch = unit / args.blocks / args.frames;
    const float* gate = read_row(args.gate, batch * args.gate_batch_stride + frame * args.gate_frame_stride,
                                 width, gate_buffer);
    float* const gate_sum = args.gate_sums + unit * width;
    std::fill_n(gate_sum, width, 0.f);
    const int64_t first = block * args.tokens_a_block;
    const int64_t last = std::min(first + args.tokens_a_block, tokens_a_frame);
    for (int64_t t = first; t < last; ++t) {
      const int64_t token = frame * tokens_a_frame + t, row = batch * args.tokens + token;
      const float* grad = read_row(args.grad_out, row * width, width, grad_buffer);
      const float* y =
          read_row(args.y, batch * args.y_batch_stride + token * args.y_token_stride, width, y_buffer);
      float* grad_y = row_to_write(args.grad_y, row * width, grad_y_buffer);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float g = grad[i];
        gate_sum[i] += g * y[i];
        grad_y[i] = g * gate[i];
      }
      write_row(args.grad_y, row * width, width, grad_y);
    }
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
