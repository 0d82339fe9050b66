#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "cuda/launch.h"

namespace stream_r1::cuda {

LaunchError current_device(Device& device) {
  static std::mutex lock;
  static std::vector<Device> known;
  int index = 0, major = 0, minor = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const std::lock_guard<std::mutex> guard(lock);
  if (static_cast<int>(known.size()) <= index) known.resize(index + 1);
  if (known[index].capability == 0) {
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    known[index] = {10 * major + minor, processors};
  }
  device = known[index];
  return nullptr;
}

}  // namespace stream_r1::cuda
