#include "cpu/rms_norm_silu_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/sigmoid.h"
#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

// Rows are short: the sums of some are there before the roots of the first are waited for.
constexpr int64_t kRows = 16;

template <Element kElement>
float sum_of_squares(const Stored<kElement>* x, int64_t width) {
  Vec squares[kParts] = {};
  for_vectors(width, [&](int64_t i, auto lanes, auto part) STREAM_R1_INLINE {
    const Vec v = load<kElement>(x + i, lanes);
    squares[part] += v * v;
  });
  return sum_parts(squares);
}

template <Element kElement, bool kSilu>
void forward(const RmsNormSiluArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, rows = args.leading + args.tokens;
  const float inverse_width = 1 / static_cast<float>(width);
  for (int64_t row = begin; row < end;) {
    const int64_t batch = row / rows, place = row % rows, token = place - args.leading;
    auto* out = at<kElement>(args.out, row * width);
    if (token < 0) {
      const int64_t offset = batch * args.before_batch_stride + place * args.before_token_stride;
      std::memcpy(out, at<kElement>(args.before, offset), width * sizeof *out);
      ++row;
      continue;
    }
    const auto* x = at<kElement>(args.x, batch * args.x_batch_stride + token * args.x_token_stride);
    const int64_t count = std::min({kRows, end - row, args.tokens - token});
    float scales[kRows];
    for (int64_t r = 0; r < count; ++r)
      scales[r] = sum_of_squares<kElement>(x + r * args.x_token_stride, width);
    for (int64_t r = 0; r < count; ++r) scales[r] = 1 / std::sqrt(scales[r] * inverse_width + args.eps);
    for (int64_t r = 0; r < count; ++r, x += args.x_token_stride, out += width) {
      const float scale = scales[r];
      for_each_vector(width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
        const Vec n = load<kElement>(x + i, lanes) * scale * load(args.weight + i, lanes);
        if constexpr (kSilu)
          store<kElement>(out + i, times_sigmoid(n, n), lanes, args.past_cache);
        else
          store<kElement>(out + i, n, lanes, args.past_cache);
      });
    }
    row += count;
  }
}

}  // namespace

void rms_norm_silu(const RmsNormSiluArgs& args, int64_t begin, int64_t end) {
  with_element(args.x.element, [&](auto element) {
    if (args.silu)
      forward<element(), true>(args, begin, end);
    else
      forward<element(), false>(args, begin, end);
  });
  end_streaming(args.past_cache);
}

}  // namespace stream_r1::STREAM_R1_ISA
