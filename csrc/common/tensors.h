// Tensors by libtorch's stable ABI, which one build shares with every torch from 2.10 on: what op files need
// of them, on any device.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "common/views.h"

namespace stream_r1 {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// An element type, by torch's own number.
struct Dtype {
  int32_t code;
  bool operator==(const Dtype&) const = default;
};

inline const Dtype kFloat{aoti_torch_dtype_float32()}, kBFloat16{aoti_torch_dtype_bfloat16()},
    kHalf{aoti_torch_dtype_float16()}, kDouble{aoti_torch_dtype_float64()}, kInt{aoti_torch_dtype_int32()};

inline Dtype dtype_of(const Tensor& tensor) {
  Dtype dtype{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype.code));
  return dtype;
}

// --- errors ---

inline std::ostream& operator<<(std::ostream& text, const Dtype& dtype) {
  using torch::stable::detail::from, torch::stable::detail::to;
  return text << torch::headeronly::toString(to<torch::headeronly::ScalarType>(from(dtype.code)));
}

inline std::ostream& operator<<(std::ostream& text, const Sizes& sizes) {
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  return text << ']';
}

template <class... Parts>
[[gnu::noinline, gnu::cold]] std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// ValueError in Python whatever is wrong: of the kinds that Python's own code raises, no other comes through
// the stable ABI.
#define STREAM_R1_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]        \
  throw std::invalid_argument(::stream_r1::message(__VA_ARGS__))

// --- memory ---

// Uninitialised, without gaps, on the device of `like`.
inline Tensor allocate(Sizes sizes, Dtype dtype, const Tensor& like) {
  constexpr size_t kMostDims = 8;
  std::array<int64_t, kMostDims> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides.at(d) = stride;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype.code,
                               device_type, device_index, &made) != TORCH_SUCCESS)
    throw std::runtime_error(message("stream_r1: torch could not allocate ", sizes, " of ", dtype));
  return Tensor(made);
}

inline Tensor allocate(Sizes sizes, const Tensor& like) { return allocate(sizes, dtype_of(like), like); }

inline Tensor allocate_zeros(Sizes sizes, Dtype dtype, const Tensor& like) {
  Tensor made = allocate(sizes, dtype, like);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(made.get()));
  return made;
}

inline Tensor without_gaps(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor to_dtype(const Tensor& tensor, Dtype dtype) {
  if (dtype_of(tensor) == dtype) return tensor;
  using torch::stable::detail::from, torch::stable::detail::to;
  return torch::stable::to(tensor, to<torch::headeronly::ScalarType>(from(dtype.code)));
}

inline Tensor expanded(const Tensor& tensor, Sizes sizes) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(tensor), from(sizes), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The tensor itself if its last dimensions lie in memory without gaps, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& tensor, int64_t last_dims = 1) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > sizes.size() - last_dims;) {
    if (sizes[d] != 1 && strides[d] != expected) return without_gaps(tensor);
    expected *= sizes[d];
  }
  return tensor;
}

// The tensor itself if it is float32 without gaps, else a copy that is.
inline Tensor contiguous_float(const Tensor& tensor) { return without_gaps(to_dtype(tensor, kFloat)); }

// [B, T, H, D] for the heads of x [B, T, H * D].
inline Tensor empty_heads(const Tensor& x, int64_t heads) {
  return allocate({x.size(0), x.size(1), heads, x.size(2) / heads}, x);
}

// The memory that a tensor's elements lie in, from the first to the last.
struct Extent {
  explicit Extent(const Tensor& tensor)
      : begin(reinterpret_cast<uintptr_t>(tensor.const_data_ptr())), end(begin) {
    const Sizes sizes = tensor.sizes(), strides = tensor.strides();
    int64_t last = 0;
    bool empty = false;
    for (size_t d = 0; d < sizes.size(); ++d) {
      empty |= sizes[d] == 0;
      last += (sizes[d] - 1) * strides[d];
    }
    if (!empty) end += (last + 1) * aoti_torch_dtype_element_size(dtype_of(tensor).code);
  }
  uintptr_t begin, end;
};

// Is every element of the tensor's memory one of its own, in whatever order of dimensions?
inline bool lies_without_gaps(const Tensor& tensor) {
  const Extent extent(tensor);
  const size_t item = aoti_torch_dtype_element_size(dtype_of(tensor).code);
  if (extent.end - extent.begin != tensor.numel() * item) return false;
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && strides[d] == 0) return false;
  return true;
}

// --- what kernels take ---

inline Element element_of(const Tensor& tensor) {
  const Dtype dtype = dtype_of(tensor);
  if (dtype == kFloat) return Element::float32;
  if (dtype == kBFloat16) return Element::bfloat16;
  STREAM_R1_CHECK(dtype == kHalf, "stream_r1: expected float32, bfloat16 or float16, got ", dtype);
  return Element::float16;
}

inline Source source(const Tensor& tensor) { return {tensor.const_data_ptr(), element_of(tensor)}; }

inline Target target(const Tensor& tensor) { return {tensor.mutable_data_ptr(), element_of(tensor)}; }

// Strides of [B, F, C, h, w]; 0 along what is broadcast.
inline Planes planes(const Tensor& tensor) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  const auto stride = [&](size_t d) { return sizes[d] == 1 ? int64_t{0} : strides[d]; };
  return {stride(0), stride(1), stride(2)};
}

}  // namespace stream_r1
