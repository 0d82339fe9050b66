#include "cpu/qk_norm_rotary_kernel.h"

#include <cmath>

#include "common/simd.h"
#include "cpu/rows.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

// Pairs of a head: (a, b) -> (a cos - b sin, a sin + b cos).
void rotate(const float* from, int64_t pairs, const float* cos, const float* sin, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float even = from[2 * i], odd = from[2 * i + 1];
    to[2 * i] = even * cos[i] - odd * sin[i];
    to[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

void rotate_back(const float* from, int64_t pairs, const float* cos, const float* sin, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float even = from[2 * i], odd = from[2 * i + 1];
    to[2 * i] = even * cos[i] + odd * sin[i];
    to[2 * i + 1] = odd * cos[i] - even * sin[i];
  }
}

float inverse_rms(const float* row, int64_t width, float eps) {
  Vec squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Vec a = load(row + i), b = load(row + i + kLanes);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  float total = sum(squares[0] + squares[1]);
  for (; i < width; ++i) total += row[i] * row[i];
  return 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

}  // namespace

void norm_rotary(const NormRotaryArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.heads * a.head_dim, pairs = a.head_dim / 2;
  Scratch input(width), normed(width), rotated(a.head_dim);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / a.tokens, t = r % a.tokens;
    const float* x = read_row(a.x, b * a.x_batch + t * a.x_token, width, input);
    const float scale = inverse_rms(x, width, a.eps);
    float* n = normed;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) n[i] = x[i] * scale * a.weight[i];
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t offset = b * a.y_batch + t * a.y_token + h * a.y_head;
      float* y = row_to_write(a.out, offset, rotated);
      rotate(n + h * a.head_dim, pairs, a.cos + t * pairs, a.sin + t * pairs, y);
      write_row(a.out, offset, a.head_dim, y);
    }
  }
}

// y = R (n * w), n = x * s, s = (mean x^2 + eps)^-1/2. With g = R^T grad_y:
// grad_w = sum over rows of g * n,  grad_x = s * (g * w - n * mean(g * w * n)).
void norm_rotary_backward(const NormRotaryArgs& a, int64_t begin, int64_t end, float* grad_weight) {
  const int64_t width = a.heads * a.head_dim, pairs = a.head_dim / 2;
  Scratch input(width), normed(width), grad(width), incoming(a.head_dim), result(width);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / a.tokens, t = r % a.tokens;
    const float* x = read_row(a.x, b * a.x_batch + t * a.x_token, width, input);
    const float scale = inverse_rms(x, width, a.eps);
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* y =
          read_row(a.grad_out, b * a.y_batch + t * a.y_token + h * a.y_head, a.head_dim, incoming);
      rotate_back(y, pairs, a.cos + t * pairs, a.sin + t * pairs, grad + h * a.head_dim);
    }
    float *n = normed, *g = grad;
    float product = 0.0f;
#pragma omp simd reduction(+ : product)
    for (int64_t i = 0; i < width; ++i) {
      n[i] = x[i] * scale;
      grad_weight[i] += g[i] * n[i];
      g[i] *= a.weight[i];
      product += g[i] * n[i];
    }
    const float mean = product / static_cast<float>(width);
    float* grad_x = row_to_write(a.out, r * width, result);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) grad_x[i] = scale * (g[i] - n[i] * mean);
    write_row(a.out, r * width, width, grad_x);
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
