// A CUDA runtime of which a launch is a call of a function: the host code of the kernels is linked against
// it, so that tests get the very grid, shared memory and arguments that a GPU would get, and can execute the
// kernel themselves.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Launch = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                        const void* argument);

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

Launch launch = nullptr;
int processors = 1;
cudaError_t last_error = cudaSuccess;
std::vector<Configuration> configurations;

struct Kernel {
  std::string name;
  size_t shared_limit = 48 * 1024;  // bytes of dynamic shared memory that a launch may ask for
};

// By host function. In a function, as kernels are registered before this file's variables exist.
std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> all;
  return all;
}

}  // namespace

extern "C" {

void on_launch(Launch function) { launch = function; }
void set_processors(int count) { processors = count; }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// By way of the dispatcher, so that the tests see what is allocated.
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t, int32_t, AtenTensorHandle* made) {
  using torch::headeronly::IntHeaderOnlyArrayRef, torch::headeronly::ScalarType;
  using torch::stable::detail::from, torch::stable::detail::to;
  const auto dims = static_cast<size_t>(ndim);
  std::array<StableIValue, 6> stack{from(IntHeaderOnlyArrayRef(sizes, dims)),
                                    from(IntHeaderOnlyArrayRef(strides, dims)),
                                    from(std::optional(to<ScalarType>(from(dtype)))),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  const AOTITorchError error =
      torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION);
  if (error == TORCH_SUCCESS) *made = to<AtenTensorHandle>(stack[0]);
  return error;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  kernels()[host].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  const Kernel& known = kernels().at(kernel);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      shared > known.shared_limit)
    return last_error = cudaErrorInvalidConfiguration;
  const unsigned grid_sizes[] = {grid.x, grid.y, grid.z}, block_sizes[] = {block.x, block.y, block.z};
  launch(known.name.c_str(), grid_sizes, block_sizes, shared, arguments[0]);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) kernels()[kernel].shared_limit = value;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "another error";
}
cudaError_t cudaGetDevice(int* device) {
  *device = processors;  // a device of its own for every number: what is known of a device is asked once
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8
           : attribute == cudaDevAttrMultiProcessorCount  ? processors
                                                          : 0;
  return cudaSuccess;
}

}  // extern "C"
