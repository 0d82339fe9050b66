// From tensors to what the launch functions take.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/registration.h"
#include "common/tensors.h"
#include "cuda/launch.h"

// The dispatch key that the ops are registered for. Tests register them for another one, on tensors in
// ordinary memory, with a runtime of their own (tests/cuda/runtime.cpp).
#ifndef STREAM_R1_CUDA_KEY
#define STREAM_R1_CUDA_KEY CUDA
#endif

namespace stream_r1::cuda {

inline void check_launch(const char* op, LaunchError error) {
  if (error != nullptr) throw std::runtime_error(message(op, ": CUDA says: ", error));
}

// While it lives the device of a tensor is the current one; `stream` is torch's current stream there.
//
// Torch's own stream functions are in a library that a CPU build of torch lacks, and the extension has to
// load there: the function is looked up when it is needed.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    const int32_t index = tensor.get_device_index();
    if (index >= 0) guard_.emplace(index);  // ordinary memory, in tests, has no index
    using Find = int32_t (*)(int32_t device, void** stream);
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    static const auto find = [] {
      void* symbol = dlsym(RTLD_DEFAULT, name);
      if (symbol == nullptr)
        if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
          symbol = dlsym(library, name);
      return reinterpret_cast<Find>(symbol);
    }();
    if (find == nullptr)
      throw std::runtime_error(message("stream_r1: expected a torch with CUDA, got one without ", name));
    void* found = nullptr;
    if (find(index, &found) != 0)
      throw std::runtime_error(message("stream_r1: torch has no current stream on device ", index));
    stream = static_cast<Stream>(found);
  }

  Stream stream;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Does every row along the last dimension start at a multiple of 16 bytes?
inline bool rows_are_aligned(const Tensor& x) {
  const int64_t item = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(x).code));
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d + 1 < x.dim(); ++d)
    if (x.size(d) > 1 && x.stride(d) * item % 16 != 0) return false;
  return true;
}

}  // namespace stream_r1::cuda
