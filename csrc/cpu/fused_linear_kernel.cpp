// A matmul in tiles, and what follows it done on a tile while it lies in the cache. Weights are read where
// they lie: a panel of 64 columns is packed, piece by piece along a great depth, and stays in the L2 cache
// while a block of rows passes over it.

#include "cpu/fused_linear_kernel.h"

#include <algorithm>

#include "cpu/attention_pack.h"
#include "cpu/sigmoid.h"
#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {
namespace {

constexpr int64_t kDepth = 1024;  // most words along the depth of a piece: 256 KiB

// v times the sigmoid of 2 sqrt(2 / pi) (v + 0.044715 v^3): GELU by its tanh approximation.
inline Vec gelu(Vec v) { return times_sigmoid(v, v * (1.5957691216f + 0.0713548163f * (v * v))); }

// Rows of a matrix with words along its own rows.
struct Words {
  const float* data;
  int64_t stride;
};

// Whether a matrix can be read as words where it lies; and by whole vectors, not reading past a row's end.
template <class Math>
bool lies_in_words(const Source& matrix, int64_t stride, int64_t depth) {
  return (matrix.element == Element::float32 ? 4 : 2) * Math::kPerWord == 4 && depth % Math::kPerWord == 0 &&
         stride % Math::kPerWord == 0;
}

template <class Math>
bool lies_in_vectors(const Source& matrix, int64_t stride, int64_t depth) {
  return lies_in_words<Math>(matrix, stride, depth) && depth / Math::kPerWord % kLanes == 0;
}

// Elements [first, first + count) of some rows: where they lie, or packed into `staging` and padded with
// zeros to whole vectors.
template <class Math>
Words read_words(const Source& from, int64_t stride, int64_t row, int64_t rows, int64_t first, int64_t count,
                 bool as_they_lie, float* staging) {
  const int64_t size = from.element == Element::float32 ? 4 : 2;
  const char* data = static_cast<const char*>(from.data) + (row * stride + first) * size;
  if (as_they_lie) return {reinterpret_cast<const float*>(data), stride / Math::kPerWord};
  const HeadSizes<Math> sizes(count);
  pack_rows({{data, from.element}, {0, stride, 0}, 0, 0, 0, rows}, sizes, staging);
  return {staging, sizes.row};
}

// What one thread works with.
template <class Math>
class Worker {
 public:
  explicit Worker(const FusedLinearArgs& args)
      : a_(args),
        words_(std::min(kDepth, round_up(words_of<Math>(args.depth), kLanes))),
        rows_lie_(lies_in_words<Math>(args.x, args.x_stride, args.depth)),
        weights_lie_(std::all_of(args.layers, args.layers + args.num_layers,
                                 [&](const LinearLayer& layer) {
                                   return lies_in_vectors<Math>(layer.weight, layer.weight_stride,
                                                                args.depth);
                                 })),
        weights_(weights_lie_ ? 0 : kLinearColumns * words_),
        panel_(words_ * kLinearColumns),
        rows_(rows_lie_ ? 0 : args.block_rows * words_),
        sums_(args.block_rows * kLinearColumns),
        bias_(kLinearColumns),
        gate_(kLinearColumns) {}

  // Rows [row, row + rows) of the columns [column, column + columns) of a layer.
  void run(const LinearLayer& layer, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const int64_t wide = round_up(columns, kLanes), piece = words_ * Math::kPerWord;
    for (int64_t first = 0; first < a_.depth; first += piece) {
      const int64_t count = std::min(piece, a_.depth - first), words = words_of<Math>(count);
      const Words w = read_words<Math>(layer.weight, layer.weight_stride, column, columns, first, count,
                                       weights_lie_, weights_);
      transpose(w.data, columns, words, w.stride, panel_, kLinearColumns);
      const Words x = read_words<Math>(a_.x, a_.x_stride, row, rows, first, count, rows_lie_, rows_);
      product<Math>(a_.brgemm, rows, wide, words, x.data, x.stride, panel_, kLinearColumns,
                    {first == 0 ? Start::zero : Start::there}, sums_, kLinearColumns);
    }
    const float* bias = nullptr;
    if (layer.bias.data != nullptr) bias = read_row(layer.bias, column, columns, bias_);
    with_element(a_.out.element, [&](auto element) {
      finish<element()>(row, rows, layer.first_column + column, columns, bias);
    });
  }

 private:
  template <Element kElement>
  void finish(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* bias) {
    const float* gate = nullptr;
    int64_t current = -1;  // the frame whose gate is at hand
    for (int64_t i = 0; i < rows; ++i) {
      if (a_.gate.data != nullptr && (row + i) / a_.tokens_a_frame != current) {
        current = (row + i) / a_.tokens_a_frame;
        const int64_t offset =
            current / a_.frames * a_.gate_batch_stride + current % a_.frames * a_.gate_frame_stride + column;
        gate = read_row(a_.gate, offset, columns, gate_);
      }
      const float* sums = sums_ + i * kLinearColumns;
      auto* out = at<kElement>(a_.out, (row + i) * a_.width + column);
      const auto* residual = a_.residual.data == nullptr
                                 ? nullptr
                                 : at<kElement>(a_.residual, (row + i) * a_.residual_stride + column);
      for_each_vector(columns, [&](int64_t j, auto lanes) STREAM_R1_INLINE {
        Vec v = load(sums + j, lanes);
        if (bias != nullptr) v += load(bias + j, lanes);
        if (a_.gelu) v = gelu(v);
        if (gate != nullptr) v *= load(gate + j, lanes);
        if (residual != nullptr) v += load<kElement>(residual + j, lanes);
        store<kElement>(out + j, v, lanes);
      });
    }
  }

  const FusedLinearArgs& a_;
  int64_t words_;                // of a piece, at most
  bool rows_lie_, weights_lie_;  // as words in memory
  Scratch weights_;              // [columns, words]
  Scratch panel_;                // [words, columns]
  Scratch rows_;                 // [rows, words]
  Scratch sums_;                 // [rows, columns]
  Scratch bias_, gate_;
};

template <class Math>
void forward(const FusedLinearArgs& args, int64_t begin, int64_t end) {
  int64_t panels = 0;
  for (int64_t i = 0; i < args.num_layers; ++i) panels += linear_panels(args.layers[i]);
  const int64_t full_groups = args.block_rows / kLinearRows;
  Worker<Math> worker(args);
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / (panels * full_groups), first_row = block * args.block_rows;
    const int64_t rows = std::min(args.block_rows, args.rows - first_row);
    const int64_t groups = (rows + kLinearRows - 1) / kLinearRows;
    const int64_t within = unit - block * panels * full_groups, group = within % groups;
    const int64_t count = std::min(groups - group, end - unit);
    int64_t panel = within / groups;
    const LinearLayer* layer = args.layers;
    for (; panel >= linear_panels(*layer); ++layer) panel -= linear_panels(*layer);
    const int64_t row = group * kLinearRows, column = panel * kLinearColumns;
    worker.run(*layer, first_row + row, std::min(count * kLinearRows, rows - row), column,
               std::min(kLinearColumns, layer->columns - column));
    unit += count;
  }
}

}  // namespace

void fused_linear(const FusedLinearArgs& args, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (args.x.element == Element::bfloat16) return forward<BFloat16>(args, begin, end);
#endif
  forward<Float32>(args, begin, end);
}

}  // namespace stream_r1::STREAM_R1_ISA
