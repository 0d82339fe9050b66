#include "cpu/dmd_kernel.h"

#include <algorithm>
#include <cfloat>

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr int64_t kPiece = 1024;  // elements at a time: buffers stay in the L1 cache, float32 sums short

// What one element weighs: w_intra where the mask keeps it, else 0. One value for the whole piece, or
// `values`.
struct Weight {
  float value = 1;
  const float* values = nullptr;
};

// A piece of a plane: n elements of [b, f, c] from `start` on.
struct Piece {
  int64_t b, f, c, start, n;

  int64_t offset(const Planes& planes) const { return planes.offset(b, f, c) + start; }
};

// Calls body(piece) for the pieces of a block.
template <class Body>
void for_pieces(const DmdArgs& args, int64_t unit, const Body& body) {
  const int64_t batch = unit / args.blocks, first = unit % args.blocks * args.planes_a_block;
  const int64_t last = std::min(first + args.planes_a_block, args.frames * args.channels);
  int64_t f = first / args.channels, c = first % args.channels;
  for (int64_t p = first; p < last; ++p) {
    for (int64_t start = 0; start < args.plane; start += kPiece)
      body(Piece{batch, f, c, start, std::min(kPiece, args.plane - start)});
    if (++c == args.channels) c = 0, ++f;
  }
}

Weight weight_of(const DmdArgs& args, const Piece& piece, float* buffer) {
  Weight weight;
  if (args.w_intra != nullptr) {
    const float* w = args.w_intra + args.w_intra_planes.offset(piece.b, piece.f, piece.c);
    if (args.w_intra_varies)
      weight.values = w + piece.start;
    else
      weight.value = *w;
  }
  if (args.mask == nullptr) return weight;
  const bool* keep = args.mask + args.mask_planes.offset(piece.b, piece.f, piece.c);
  if (!args.mask_varies) return *keep ? weight : Weight{0, nullptr};
  keep += piece.start;
#pragma omp simd
  for (int64_t i = 0; i < piece.n; ++i)
    buffer[i] = keep[i] ? (weight.values == nullptr ? weight.value : weight.values[i]) : 0.f;
  return {0, buffer};
}

int64_t kept_elements(const DmdArgs& args, const Piece& piece) {
  if (args.mask == nullptr) return piece.n;
  const bool* keep = args.mask + args.mask_planes.offset(piece.b, piece.f, piece.c);
  if (!args.mask_varies) return *keep ? piece.n : 0;
  int32_t kept = 0;
#pragma omp simd reduction(+ : kept)
  for (int64_t i = 0; i < piece.n; ++i) kept += keep[piece.start + i];
  return kept;
}

inline Vec finite_or_zero(Vec v) { return abs(v) <= FLT_MAX ? v : Vec{}; }

// Sums of a block: vectors of float32, emptied into float64 before they grow long.
struct Sums {
  Vec vectors[2] = {};  // distances, squares
  double totals[2] = {};
  int64_t pending = 0;

  void add(int64_t elements) {
    if ((pending += elements) >= kPiece) flush();
  }
  void flush() {
    for (int i = 0; i < 2; ++i) {
      totals[i] += sum(vectors[i]);
      vectors[i] = Vec{};
    }
    pending = 0;
  }
};

enum class Weights { none, one, many };  // none: only distances are wanted

template <Element kElement, Weights kWeights>
void measure_piece(const DmdArgs& args, const Piece& piece, const Weight& weight, Sums& sums, Vec* extremes) {
  const auto* x = at<kElement>(args.x, piece.offset(args.x_planes));
  const auto* fake = at<kElement>(args.fake, piece.offset(args.fake_planes));
  const auto* cond = at<kElement>(args.real_cond, piece.offset(args.real_cond_planes));
  const auto* uncond = at<kElement>(args.real_uncond, piece.offset(args.real_uncond_planes));
  auto* direction = at<kElement>(args.direction, piece.offset(args.direction_planes));
  const float guidance = args.guidance, value = weight.value;
  const float* values = weight.values;
  Vec distances = sums.vectors[0], squares = sums.vectors[1], largest = extremes[0], heaviest = extremes[1];
  for_each_vector(piece.n, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
    const Vec c = load<kElement>(cond + i, lanes);
    const Vec real = c + guidance * (c - load<kElement>(uncond + i, lanes));
    distances += abs(load<kElement>(x + i, lanes) - real);
    if constexpr (kWeights != Weights::none) {
      const Vec difference = finite_or_zero(load<kElement>(fake + i, lanes) - real);
      const Vec weighted = difference * (kWeights == Weights::many ? load(values + i, lanes) : splat(value));
      squares += weighted * difference;
      largest = max(abs(difference), largest);
      heaviest = max(abs(weighted), heaviest);
      store<kElement>(direction + i, weighted, lanes);
    }
  });
  sums.vectors[0] = distances, sums.vectors[1] = squares;
  extremes[0] = largest, extremes[1] = heaviest;
  sums.add(piece.n);
}

template <Element kElement>
void measure(const DmdArgs& args, int64_t begin, int64_t end) {
  float buffer[kPiece];
  for (int64_t unit = begin; unit < end; ++unit) {
    Sums sums;
    Vec extremes[2] = {};
    int64_t kept = 0;
    for_pieces(args, unit, [&](const Piece& piece) {
      kept += kept_elements(args, piece);
      if (args.direction.data == nullptr)
        return measure_piece<kElement, Weights::none>(args, piece, {}, sums, extremes);
      const Weight weight = weight_of(args, piece, buffer);
      if (weight.values == nullptr)
        measure_piece<kElement, Weights::one>(args, piece, weight, sums, extremes);
      else
        measure_piece<kElement, Weights::many>(args, piece, weight, sums, extremes);
    });
    sums.flush();
    args.blocks_out[unit] = {sums.totals[0], sums.totals[1], kept, max(extremes[0]), max(extremes[1])};
  }
}

template <Element kElement>
void directions(const DmdArgs& args, int64_t begin, int64_t end) {
  float buffer[kPiece], old_buffer[kPiece], target_buffer[kPiece];
  const float guidance = args.guidance;
  for (int64_t unit = begin; unit < end; ++unit) {
    const float inverse_scale = args.inverse_scale[unit / args.blocks];
    const float factor = args.factor[unit / args.blocks];
    Sums sums;
    for_pieces(args, unit, [&](const Piece& piece) {
      Weight weight = weight_of(args, piece, buffer);
      if (weight.values == nullptr) {
        std::fill_n(buffer, piece.n, weight.value);
        weight.values = buffer;
      }
      const float* values = weight.values;
      const auto* fake = at<kElement>(args.fake, piece.offset(args.fake_planes));
      const auto* cond = at<kElement>(args.real_cond, piece.offset(args.real_cond_planes));
      const auto* uncond = at<kElement>(args.real_uncond, piece.offset(args.real_uncond_planes));
      const int64_t offset = piece.offset(args.direction_planes);
      const float* before = nullptr;
      if (args.adds)
        before = read_row({args.direction.data, args.direction.element}, offset, piece.n, old_buffer);
      float* direction = row_to_write(args.direction, offset, target_buffer);
      Vec squares = sums.vectors[1];
      for_each_vector(piece.n, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
        const Vec c = load<kElement>(cond + i, lanes);
        const Vec real = c + guidance * (c - load<kElement>(uncond + i, lanes));
        const Vec g = finite_or_zero((load<kElement>(fake + i, lanes) - real) * inverse_scale);
        const Vec weighted = g * load(values + i, lanes);
        squares += weighted * g;
        const Vec scaled = factor * weighted;
        store(direction + i, before == nullptr ? scaled : load(before + i, lanes) + scaled, lanes);
      });
      sums.vectors[1] = squares;
      sums.add(piece.n);
      write_row(args.direction, offset, piece.n, direction);
    });
    sums.flush();
    args.blocks_out[unit].squares = sums.totals[1];
  }
}

template <Element kElement>
void scale(const DmdScaleArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / args.blocks, first = unit % args.blocks * args.elements_a_block;
    const int64_t n = std::min(args.elements_a_block, args.n - first), offset = b * args.n + first;
    const float factor = args.factor[b];
    const auto* direction = at<kElement>(args.direction, offset);
    auto* grad = at<kElement>(args.grad, offset);
    for_each_vector(n, [&](int64_t i, auto lanes) STREAM_R1_INLINE {
      store<kElement>(grad + i, factor * load<kElement>(direction + i, lanes), lanes);
    });
  }
}

}  // namespace

void dmd_measure(const DmdArgs& args, int64_t begin, int64_t end) {
  with_element(args.x.element, [&](auto element) { measure<element()>(args, begin, end); });
}

void dmd_directions(const DmdArgs& args, int64_t begin, int64_t end) {
  with_element(args.x.element, [&](auto element) { directions<element()>(args, begin, end); });
}

void dmd_scale(const DmdScaleArgs& args, int64_t begin, int64_t end) {
  with_element(args.direction.element, [&](auto element) { scale<element()>(args, begin, end); });
}

}  // namespace stream_r1::STREAM_R1_ISA
