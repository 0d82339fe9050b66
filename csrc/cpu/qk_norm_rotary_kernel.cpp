#include "cpu/qk_norm_rotary_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

// A pair of channels (a, b) becomes (a cos - b sin, a sin + b cos): a vector of pairs times cos, plus the
// vector with its neighbours exchanged times sin with alternating signs.
Vec exchange_neighbours(Vec v) {
#if defined(__AVX512F__)
  return cast_bits<Vec>(_mm512_permute_ps(cast_bits<__m512>(v), 0b10110001));
#elif defined(__AVX2__)
  return cast_bits<Vec>(_mm256_permute_ps(cast_bits<__m256>(v), 0b10110001));
#else
  return Vec{v[1], v[0], v[3], v[2]};
#endif
}

// cos and sin of a token's pairs, [D / 2], spread over the channels [D].
void spread(const float* cos, const float* sin, int64_t pairs, float* cosines, float* signed_sines) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    cosines[2 * i] = cosines[2 * i + 1] = cos[i];
    signed_sines[2 * i] = -sin[i];
    signed_sines[2 * i + 1] = sin[i];
  }
}

template <Element kElement>
float inverse_rms(const Stored<kElement>* x, int64_t width, float eps) {
  Vec squares[kParts] = {};
  for_vectors(width, [&](int64_t i, auto lanes, auto part) STREAM_R1_INLINE {
    const Vec v = load<kElement>(x + i, lanes);
    squares[part] += v * v;
  });
  return 1.0f / std::sqrt(sum_parts(squares) / static_cast<float>(width) + eps);
}

template <Element kElement>
void forward(const NormRotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.heads * args.head_dim;
  Scratch cos_buffer(args.head_dim), sin_buffer(args.head_dim);
  float *const cosines = cos_buffer, *const sines = sin_buffer;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.tokens, t = row % args.tokens, pairs = args.head_dim / 2;
    spread(args.cos + t * pairs, args.sin + t * pairs, pairs, cosines, sines);
    for (const NormRotarySide& side : args.sides) {
      const auto* x = at<kElement>(side.x, b * side.x_batch + t * side.x_token);
      const float scale = inverse_rms<kElement>(x, width, args.eps);
      for (int64_t h = 0; h < args.heads; ++h) {
        const auto* from = x + h * args.head_dim;
        const float* weight = side.weight + h * args.head_dim;
        auto* to = at<kElement>(side.out, b * side.y_batch + t * side.y_token + h * side.y_head);
        for_each_vector(args.head_dim, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
          __builtin_prefetch(from + i + side.x_token);  // the next row, which is not the next in memory
          const Vec n = load<kElement>(from + i, lanes) * scale * load(weight + i, lanes);
          const Vec turned = exchange_neighbours(n) * load(sines + i, lanes);
          store<kElement>(to + i, n * load(cosines + i, lanes) + turned, lanes, side.past_cache);
        });
      }
    }
  }
}

// With g the incoming gradient rotated back, n = x * s (s the inverse RMS) and w the weight:
// grad_w = sum of g * n,  grad_x = s * (g * w - n * mean(g * w * n)).
template <Element kElement>
void backward(const NormRotaryArgs& args, int64_t begin, int64_t end, float* const grad_weights) {
  const int64_t width = args.heads * args.head_dim, pairs = args.head_dim / 2;
  Scratch cos_buffer(args.head_dim), sin_buffer(args.head_dim), grad_buffer(width);
  float *const cosines = cos_buffer, *const sines = sin_buffer, *const grad = grad_buffer;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.tokens, t = row % args.tokens;
    spread(args.cos + t * pairs, args.sin + t * pairs, pairs, cosines, sines);
    float* grad_weight = grad_weights;
    for (const NormRotarySide& side : args.sides) {
      const auto* x = at<kElement>(side.x, b * side.x_batch + t * side.x_token);
      const float scale = inverse_rms<kElement>(x, width, args.eps);
      Vec products[kParts] = {};
      for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t first = h * args.head_dim;
        const auto* y = at<kElement>(side.grad_out, b * side.y_batch + t * side.y_token + h * side.y_head);
        for_vectors(args.head_dim, [&](int64_t i, auto lanes, auto part) STREAM_R1_INLINE {
          const int64_t j = first + i;
          __builtin_prefetch(y + i + side.y_token);  // the next rows, as above
          __builtin_prefetch(x + j + side.x_token);
          const Vec incoming = load<kElement>(y + i, lanes), n = load<kElement>(x + j, lanes) * scale;
          const Vec turned = exchange_neighbours(incoming) * load(sines + i, lanes);
          const Vec g = incoming * load(cosines + i, lanes) - turned;
          store(grad_weight + j, load(grad_weight + j, lanes) + g * n, lanes);
          const Vec weighted = g * load(side.weight + j, lanes);
          store(grad + j, weighted, lanes);
          products[part] += weighted * n;
        });
      }
      const float mean = sum_parts(products) / static_cast<float>(width);
      auto* grad_x = at<kElement>(side.out, row * width);
      for_each_vector(width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
        const Vec n = load<kElement>(x + i, lanes) * scale;
        store<kElement>(grad_x + i, scale * (load(grad + i, lanes) - n * mean), lanes, side.past_cache);
      });
      grad_weight += width;
    }
  }
}

}  // namespace

void norm_rotary(const NormRotaryArgs& args, int64_t begin, int64_t end) {
  with_element(args.element, [&](auto element) { forward<element()>(args, begin, end); });
  end_streaming(args.sides[0].past_cache || args.sides[1].past_cache);
}

void norm_rotary_backward(const NormRotaryArgs& args, int64_t begin, int64_t end, float* grad_weights) {
  with_element(args.element, [&](auto element) { backward<element()>(args, begin, end, grad_weights); });
  end_streaming(args.sides[0].past_cache || args.sides[1].past_cache);
}

}  // namespace stream_r1::STREAM_R1_ISA
