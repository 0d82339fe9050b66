#include "cpu/region_saliency_kernel.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return cast_bits<Vec>(_mm512_sqrt_ps(cast_bits<__m512>(v)));
#elif defined(__AVX2__)
  return cast_bits<Vec>(_mm256_sqrt_ps(cast_bits<__m256>(v)));
#else
  for (int64_t i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Squares of these leave the range of float32 or lose digits at its end; those of float16 never do.
constexpr float kMostSquare = 1e37f, kLeastSquare = 1e-30f;

// The norms again where the squares are out of range, each scaled by its largest channel. `line` is of one
// vector.
template <Element kElement, class Lanes>
[[gnu::noinline]] Vec scaled_norms(const RegionSaliencyArgs& args, const Stored<kElement>* line, Lanes lanes,
                                   Vec squares) {
  Vec norms = square_root(squares), largest = {};
  for (int64_t c = 0; c < args.channels; ++c)
    largest = max(abs(load<kElement>(line + c * args.channel_stride, lanes)), largest);
  for (int64_t i = 0; i < kLanes; ++i) {
    if (std::isnan(squares[i]) || !(largest[i] > 0 && largest[i] <= FLT_MAX)) continue;
    if (squares[i] >= kLeastSquare && squares[i] <= kMostSquare) continue;
    const int exponent = std::ilogb(largest[i]);
    float sum = 0;
    for (int64_t c = 0; c < args.channels; ++c) {
      const float part = std::ldexp(load<kElement>(line + c * args.channel_stride, lanes)[i], -exponent);
      sum += part * part;
    }
    norms[i] = std::ldexp(std::sqrt(sum), exponent);
  }
  return norms;
}

// The norm over the channels of the pixels of a vector; `line` is its first channel.
template <Element kElement, class Lanes>
STREAM_R1_INLINE inline Vec norms_of(const RegionSaliencyArgs& args, const Stored<kElement>* line,
                                     Lanes lanes, Vec squares, Vec magnitude) {
  if constexpr (kElement != Element::float16)
    if (any(~((squares >= kLeastSquare) & (squares <= kMostSquare)) & (magnitude != 0.0f))) [[unlikely]]
      return scaled_norms<kElement>(args, line, lanes, squares);
  return square_root(squares);
}

// Adds the norm over the channels of each pixel of a line.
template <Element kElement>
void add_norms(const RegionSaliencyArgs& args, const Stored<kElement>* line, float* sums) {
  if (args.channels == 3) {
    const auto *green = line + args.channel_stride, *blue = green + args.channel_stride;
    for_each_vector(args.width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      const Vec r = load<kElement>(line + i, lanes), g = load<kElement>(green + i, lanes),
                b = load<kElement>(blue + i, lanes);
      const Vec norms =
          norms_of<kElement>(args, line + i, lanes, r * r + g * g + b * b, abs(r) + abs(g) + abs(b));
      store(sums + i, load(sums + i, lanes) + norms, lanes);
    });
    return;
  }
  for_each_vector(args.width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
    Vec squares = {}, magnitude = {};
    for (int64_t c = 0; c < args.channels; ++c) {
      const Vec value = load<kElement>(line + c * args.channel_stride + i, lanes);
      squares += value * value;
      magnitude += abs(value);
    }
    const Vec norms = norms_of<kElement>(args, line + i, lanes, squares, magnitude);
    store(sums + i, load(sums + i, lanes) + norms, lanes);
  });
}

template <Element kElement>
void reduce(const RegionSaliencyArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, cell_height = args.height / args.rows, cell_width = width / args.columns;
  const int64_t factor = args.frames == 1 ? 0 : (args.pixel_frames - 1) / (args.frames - 1);
  Scratch buffer(width);
  float* const sums = buffer;  // over the lines of a band, a column of pixels each
  for (int64_t band = begin; band < end; ++band) {
    const int64_t row = band % args.rows, frame = band / args.rows % args.frames,
                  sample = band / args.rows / args.frames;
    const int64_t first = frame == 0 ? 0 : 1 + factor * (frame - 1), pixel_frames = frame == 0 ? 1 : factor;
    const int64_t corner = sample / args.batch * args.axis_stride + sample % args.batch * args.batch_stride +
                           first * args.frame_stride + row * cell_height * args.row_stride;
    std::fill_n(sums, width, 0.f);
    for (int64_t f = 0; f < pixel_frames; ++f) {
      const auto* line = at<kElement>(args.grads, corner + f * args.frame_stride);
      for (int64_t y = 0; y < cell_height; ++y, line += args.row_stride)
        add_norms<kElement>(args, line, sums);
    }
    const float share = 1.f / static_cast<float>(pixel_frames * cell_height * cell_width);
    for (int64_t column = 0; column < args.columns; ++column) {
      float total = 0;
      for (int64_t i = 0; i < cell_width; ++i) total += sums[column * cell_width + i];
      args.out[band * args.columns + column] = total * share;
    }
  }
}

}  // namespace

void region_saliency(const RegionSaliencyArgs& args, int64_t begin, int64_t end) {
  with_element(args.grads.element, [&](auto element) { reduce<element()>(args, begin, end); });
}

}  // namespace stream_r1::STREAM_R1_ISA
