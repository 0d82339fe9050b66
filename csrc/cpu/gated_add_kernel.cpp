#include "cpu/gated_add_kernel.h"

#include <algorithm>

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

// kElement is x's. A y of another type stands beside a float32 x and is read row by row as float32.
template <Element kElement>
void forward(const GatedAddArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  const bool mixed = args.y.element != kElement;
  Scratch gate_buffer(width), y_buffer(mixed ? width : 0);
  int64_t current = -1;  // the frame whose gate is at hand
  const float* gate = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / args.tokens, token = row % args.tokens, frame = token / tokens_a_frame;
    if (batch * args.frames + frame != current) {
      current = batch * args.frames + frame;
      gate = read_row(args.gate, batch * args.gate_batch_stride + frame * args.gate_frame_stride, width,
                      gate_buffer);
    }
    const auto* x = at<kElement>(args.x, batch * args.x_batch_stride + token * args.x_token_stride);
    const int64_t y_offset = batch * args.y_batch_stride + token * args.y_token_stride;
    const auto* y = at<kElement>(args.y, y_offset);
    if constexpr (kElement == Element::float32) y = read_row(args.y, y_offset, width, y_buffer);
    auto* out = at<kElement>(args.out, row * width);
    for_each_vector(width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      const Vec gated = load<kElement>(y + i, lanes) * load(gate + i, lanes);
      store<kElement>(out + i, load<kElement>(x + i, lanes) + gated, lanes, args.past_cache);
    });
  }
}

// kElement is grad_out's; y and grad_y as above.
template <Element kElement>
void backward(const GatedAddBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, tokens_a_frame = args.tokens / args.frames;
  const bool mixed = args.y.element != kElement;
  const bool past_cache = args.past_cache && !mixed;
  Scratch gate_buffer(width), y_buffer(mixed ? width : 0), grad_y_buffer(mixed ? width : 0);
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
      const auto* grad = at<kElement>(args.grad_out, row * width);
      const int64_t y_offset = batch * args.y_batch_stride + token * args.y_token_stride;
      const auto* y = at<kElement>(args.y, y_offset);
      auto* grad_y = at<kElement>(args.grad_y, row * width);
      if constexpr (kElement == Element::float32) {
        y = read_row(args.y, y_offset, width, y_buffer);
        grad_y = row_to_write(args.grad_y, row * width, grad_y_buffer);
      }
      for_each_vector(width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
        const Vec g = load<kElement>(grad + i, lanes);
        store(gate_sum + i, load(gate_sum + i, lanes) + g * load<kElement>(y + i, lanes), lanes);
        store<kElement>(grad_y + i, g * load(gate + i, lanes), lanes, past_cache);
      });
      if constexpr (kElement == Element::float32) write_row(args.grad_y, row * width, width, grad_y);
    }
  }
}

}  // namespace

void gated_add(const GatedAddArgs& args, int64_t begin, int64_t end) {
  with_element(args.x.element, [&](auto element) { forward<element()>(args, begin, end); });
  end_streaming(args.past_cache);
}

void gated_add_backward(const GatedAddBackwardArgs& args, int64_t begin, int64_t end) {
  with_element(args.grad_out.element, [&](auto element) { backward<element()>(args, begin, end); });
  end_streaming(args.past_cache);
}

}  // namespace stream_r1::STREAM_R1_ISA
