#include "cpu/dmd_kernel.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/rows.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr int64_t kPiece =
    1024;  // elements at a time: every buffer stays in the L1 cache, float32 sums stay short

// Calls body(batch, frame, channel, first element in the plane, elements) for the pieces of a block.
template <class Body>
void for_pieces(const DmdArgs& args, int64_t unit, const Body& body) {
  const int64_t batch = unit / args.blocks, first = unit % args.blocks * args.planes_a_block;
  const int64_t last = std::min(first + args.planes_a_block, args.frames * args.channels);
  for (int64_t p = first; p < last; ++p)
    for (int64_t start = 0; start < args.plane; start += kPiece)
      body(batch, p / args.channels, p % args.channels, start, std::min(kPiece, args.plane - start));
}

// What one element weighs: w_intra where the mask keeps it, else 0. One value for the whole piece, or
// `values`.
struct Weight {
  float value = 1;
  const float* values = nullptr;
};

Weight weight_of(const DmdArgs& args, int64_t b, int64_t f, int64_t c, int64_t start, int64_t n,
                 float* buffer) {
  Weight weight;
  if (args.w_intra != nullptr) {
    const float* w = args.w_intra + args.w_intra_planes.offset(b, f, c);
    if (args.w_intra_varies)
      weight.values = w + start;
    else
      weight.value = *w;
  }
  if (args.mask == nullptr) return weight;
  const bool* keep = args.mask + args.mask_planes.offset(b, f, c);
  if (!args.mask_varies) return *keep ? weight : Weight{0, nullptr};
  keep += start;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    buffer[i] = keep[i] ? (weight.values == nullptr ? weight.value : weight.values[i]) : 0.f;
  return {0, buffer};
}

int64_t kept_elements(const DmdArgs& args, int64_t b, int64_t f, int64_t c, int64_t start, int64_t n) {
  if (args.mask == nullptr) return n;
  const bool* keep = args.mask + args.mask_planes.offset(b, f, c);
  if (!args.mask_varies) return *keep ? n : 0;
  int32_t kept = 0;
#pragma omp simd reduction(+ : kept)
  for (int64_t i = 0; i < n; ++i) kept += keep[start + i];
  return kept;
}

}  // namespace

void dmd_distances(const DmdArgs& args, int64_t begin, int64_t end) {
  float x_buffer[kPiece], cond_buffer[kPiece], uncond_buffer[kPiece];
  const float guidance = args.guidance;
  for (int64_t unit = begin; unit < end; ++unit) {
    double distance = 0;
    int64_t kept = 0;
    for_pieces(args, unit, [&](int64_t b, int64_t f, int64_t c, int64_t start, int64_t n) {
      const float* x = read_row(args.x, args.x_planes.offset(b, f, c) + start, n, x_buffer);
      const float* cond =
          read_row(args.real_cond, args.real_cond_planes.offset(b, f, c) + start, n, cond_buffer);
      const float* uncond =
          read_row(args.real_uncond, args.real_uncond_planes.offset(b, f, c) + start, n, uncond_buffer);
      distance += sum_terms(
          n, [=](int64_t i) { return std::abs(x[i] - (cond[i] + guidance * (cond[i] - uncond[i]))); });
      kept += kept_elements(args, b, f, c, start, n);
    });
    args.distances[unit] = distance;
    args.kept[unit] = kept;
  }
}

void dmd_directions(const DmdArgs& args, int64_t begin, int64_t end) {
  float fake_buffer[kPiece], cond_buffer[kPiece], uncond_buffer[kPiece], weight_buffer[kPiece], g[kPiece],
      old_buffer[kPiece], target_buffer[kPiece];
  const float guidance = args.guidance;
  for (int64_t unit = begin; unit < end; ++unit) {
    const float inverse_scale = args.inverse_scale[unit / args.blocks];
    double square_sum = 0;
    for_pieces(args, unit, [&](int64_t b, int64_t f, int64_t c, int64_t start, int64_t n) {
      const int64_t offset = args.direction_planes.offset(b, f, c) + start;
      const Weight weight = weight_of(args, b, f, c, start, n, weight_buffer);
      const float* fake = read_row(args.fake, args.fake_planes.offset(b, f, c) + start, n, fake_buffer);
      const float* cond =
          read_row(args.real_cond, args.real_cond_planes.offset(b, f, c) + start, n, cond_buffer);
      const float* uncond =
          read_row(args.real_uncond, args.real_uncond_planes.offset(b, f, c) + start, n, uncond_buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float difference = (fake[i] - (cond[i] + guidance * (cond[i] - uncond[i]))) * inverse_scale;
        g[i] = std::abs(difference) <= FLT_MAX ? difference : 0.f;
      }
      if (args.squares != nullptr && weight.values != nullptr)
        square_sum +=
            sum_terms(n, [&g, values = weight.values](int64_t i) { return values[i] * g[i] * g[i]; });
      else if (args.squares != nullptr && weight.value != 0)
        square_sum += weight.value * sum_terms(n, [&g](int64_t i) { return g[i] * g[i]; });
      if (args.direction.data == nullptr) return;
      const float factor = args.factor == nullptr ? 1.f : args.factor[b];
      const Source old{args.direction.data, args.direction.element};
      const float* before = args.factor == nullptr ? nullptr : read_row(old, offset, n, old_buffer);
      float* direction = row_to_write(args.direction, offset, target_buffer);
      const auto put = [&](auto term) {
        if (before == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) direction[i] = term(i);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) direction[i] = before[i] + term(i);
        }
      };
      if (weight.values != nullptr)
        put([&g, factor, values = weight.values](int64_t i) { return factor * values[i] * g[i]; });
      else
        put([&g, both = factor * weight.value](int64_t i) { return both * g[i]; });
      write_row(args.direction, offset, n, direction);
    });
    if (args.squares != nullptr) args.squares[unit] = square_sum;
  }
}

void dmd_scale(const DmdScaleArgs& args, int64_t begin, int64_t end) {
  float source_buffer[kPiece], target_buffer[kPiece];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / args.blocks, first = unit % args.blocks * args.elements_a_block;
    const int64_t last = std::min(first + args.elements_a_block, args.n);
    const float factor = args.factor[b];
    for (int64_t start = first; start < last; start += kPiece) {
      const int64_t n = std::min(kPiece, last - start), offset = b * args.n + start;
      const float* direction = read_row(args.direction, offset, n, source_buffer);
      float* grad = row_to_write(args.grad, offset, target_buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad[i] = factor * direction[i];
      write_row(args.grad, offset, n, grad);
    }
  }
}

}  // namespace stream_r1::STREAM_R1_ISA
