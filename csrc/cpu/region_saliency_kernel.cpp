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

// Adds the norm over the channels of each pixel of a line, of values times `scale` where there is one;
// returns the largest of the sums of squares.
template <Element kElement, bool kScaled>
Vec add_norms(const RegionSaliencyArgs& args, const Stored<kElement>* line, float scale, float* sums,
              Vec largest) {
  const auto value = [&](const Stored<kElement>* from, auto lanes) STREAM_R1_INLINE {
    const Vec v = load<kElement>(from, lanes);
    return kScaled ? v * scale : v;
  };
  if (args.channels == 3) {
    const auto *green = line + args.channel_stride, *blue = green + args.channel_stride;
    for_each_vector(args.width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      const Vec r = value(line + i, lanes), g = value(green + i, lanes), b = value(blue + i, lanes);
      const Vec squares = r * r + g * g + b * b;
      largest = max(squares, largest);
      store(sums + i, load(sums + i, lanes) + square_root(squares), lanes);
    });
    return largest;
  }
  for_each_vector(args.width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
    Vec squares = {};
    for (int64_t c = 0; c < args.channels; ++c) {
      const Vec v = value(line + c * args.channel_stride + i, lanes);
      squares += v * v;
    }
    largest = max(squares, largest);
    store(sums + i, load(sums + i, lanes) + square_root(squares), lanes);
  });
  return largest;
}

// Lines [first, first + lines) of the pictures of a latent frame, whose first picture begins at `corner`.
struct Band {
  int64_t corner, pixel_frames, lines;

  template <class Body>
  void for_lines(const RegionSaliencyArgs& args, const Body& body) const {
    for (int64_t f = 0; f < pixel_frames; ++f)
      for (int64_t y = 0; y < lines; ++y) body(corner + f * args.frame_stride + y * args.row_stride);
  }
};

template <Element kElement>
[[gnu::noinline]] float largest_value(const RegionSaliencyArgs& args, const Band& band) {
  Vec largest = {};
  band.for_lines(args, [&](int64_t offset) {
    for (int64_t c = 0; c < args.channels; ++c)
      for_each_vector(args.width, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
        largest =
            max(abs(load<kElement>(at<kElement>(args.grads, offset + c * args.channel_stride) + i, lanes)),
                largest);
      });
  });
  return max(largest);
}

// Sums of norms down each column of pixels of a band, times the result. Where squares leave the range of
// float32 the values are scaled by the band's largest; those of float16 never do.
template <Element kElement>
float sum_norms(const RegionSaliencyArgs& args, const Band& band, float* sums) {
  Vec largest = {};
  std::fill_n(sums, args.width, 0.f);
  band.for_lines(args, [&](int64_t offset) {
    largest = add_norms<kElement, false>(args, at<kElement>(args.grads, offset), 1, sums, largest);
  });
  const float squares = max(largest);
  if (kElement == Element::float16 || (squares >= 1e-30f && squares <= 1e37f)) return 1;
  const float value = largest_value<kElement>(args, band);
  if (!(value > 0 && value <= FLT_MAX)) return 1;
  const int exponent = std::clamp(std::ilogb(value), -126, 126);
  std::fill_n(sums, args.width, 0.f);
  band.for_lines(args, [&](int64_t offset) {
    add_norms<kElement, true>(args, at<kElement>(args.grads, offset), std::ldexp(1.f, -exponent), sums,
                              largest);
  });
  return std::ldexp(1.f, exponent);
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
    const float unit = sum_norms<kElement>(args, {corner, pixel_frames, cell_height}, sums);
    const float share = 1.f / static_cast<float>(pixel_frames * cell_height * cell_width);
    for (int64_t column = 0; column < args.columns; ++column) {
      float total = 0;
      for (int64_t i = 0; i < cell_width; ++i) total += sums[column * cell_width + i];
      args.out[band * args.columns + column] = total * share * unit;
    }
  }
}

}  // namespace

void region_saliency(const RegionSaliencyArgs& args, int64_t begin, int64_t end) {
  with_element(args.grads.element, [&](auto element) { reduce<element()>(args, begin, end); });
}

}  // namespace stream_r1::STREAM_R1_ISA
