#include "cpu/modulated_norm_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

template <Element kElement>
void forward(const ModulatedNormArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  Scratch shift_buffer(width), factor(width);  // factor: 1 + scale
  const float* shift = nullptr;
  int64_t current = -1;  // the frame whose modulation is at hand
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / args.tokens, token = row % args.tokens, frame = token / tokens_a_frame;
    if (batch * args.frames + frame != current) {
      current = batch * args.frames + frame;
      shift = read_row(args.shift, batch * args.shift_batch_stride + frame * args.shift_frame_stride, width,
                       shift_buffer);
      const float* scale = read_row(
          args.scale, batch * args.scale_batch_stride + frame * args.scale_frame_stride, width, factor);
      float* const to = factor;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = 1 + scale[i];
    }
    const auto* x = at<kElement>(args.x, batch * args.x_batch_stride + token * args.x_token_stride);
    Vec sums[kParts] = {};
    for_vectors(width, [&](int64_t i, auto lanes, auto part)
                           STREAM_R1_INLINE { sums[part] += load<kElement>(x + i, lanes); });
    const float mean = sum_parts(sums) / static_cast<float>(width);
    Vec squares[kParts] = {};
    for_vectors(width, [&](int64_t i, auto lanes, auto part) STREAM_R1_INLINE {
      const Vec d = keep(load<kElement>(x + i, lanes) - mean, lanes, Vec{});
      squares[part] += d * d;
    });
    const float rstd = 1 / std::sqrt(sum_parts(squares) / static_cast<float>(width) + args.eps);
    auto* out = at<kElement>(args.out, row * width);
    const float* const by = factor;
    for_each_vector(width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      __builtin_prefetch(x + i + args.x_token_stride);  // the next row: the sums are a wait for it otherwise
      const Vec n = (load<kElement>(x + i, lanes) - mean) * rstd;
      store<kElement>(out + i, n * load(by + i, lanes) + load(shift + i, lanes), lanes, args.past_cache);
    });
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

// With n = (x - mean) * rstd and u = grad * (1 + scale): grad_x = rstd * (u - mean(u) - n * mean(u * n)).
template <Element kElement>
void backward(const ModulatedNormBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  Scratch factor_buffer(width);
  float* const factor = factor_buffer;  // 1 + scale
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % args.blocks, frame = unit / args.blocks % args.frames,
                  batch = unit / args.blocks / args.frames;
    const float* scale = read_row(
        args.scale, batch * args.scale_batch_stride + frame * args.scale_frame_stride, width, factor);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) factor[i] = 1 + scale[i];
    float* const shift_sum = args.shift_sums + unit * width;
    float* const scale_sum = args.scale_sums + unit * width;
    std::fill_n(shift_sum, width, 0.f);
    std::fill_n(scale_sum, width, 0.f);
    const int64_t first = block * args.tokens_a_block;
    const int64_t last = std::min(first + args.tokens_a_block, tokens_a_frame);
    for (int64_t t = first; t < last; ++t) {
      const int64_t token = frame * tokens_a_frame + t, row = batch * args.tokens + token;
      const auto* grad = at<kElement>(args.grad_out, row * width);
      const auto* x = at<kElement>(args.x, batch * args.x_batch_stride + token * args.x_token_stride);
      const float mean = args.mean[row], rstd = args.rstd[row];
      Vec u_sums[kParts] = {}, un_sums[kParts] = {};
      for_vectors(width, [&](int64_t i, auto lanes, auto part) STREAM_R1_INLINE {
        const Vec g = load<kElement>(grad + i, lanes), n = (load<kElement>(x + i, lanes) - mean) * rstd;
        const Vec u = g * load(factor + i, lanes);
        store(shift_sum + i, load(shift_sum + i, lanes) + g, lanes);
        store(scale_sum + i, load(scale_sum + i, lanes) + g * n, lanes);
        u_sums[part] += u;
        un_sums[part] += u * n;
      });
      const float u_mean = sum_parts(u_sums) / static_cast<float>(width);
      const float un_mean = sum_parts(un_sums) / static_cast<float>(width);
      auto* grad_x = at<kElement>(args.grad_x, row * width);
      for_each_vector(width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
        const Vec n = (load<kElement>(x + i, lanes) - mean) * rstd;
        const Vec u = load<kElement>(grad + i, lanes) * load(factor + i, lanes);
        store<kElement>(grad_x + i, rstd * (u - u_mean - n * un_mean), lanes, args.past_cache);
      });
    }
  }
}

}  // namespace

void modulated_norm(const ModulatedNormArgs& args, int64_t begin, int64_t end) {
  with_element(args.x.element, [&](auto element) { forward<element()>(args, begin, end); });
  end_streaming(args.past_cache);
}

void modulated_norm_backward(const ModulatedNormBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.x.element, [&](auto element) { backward<element()>(args, begin, end); });
  end_streaming(args.past_cache);
}

}  // namespace stream_r1::STREAM_R1_ISA
