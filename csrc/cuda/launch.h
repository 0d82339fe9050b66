// What the launch functions have in common. Plain C++: no CUDA headers, no torch headers.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace stream_r1::cuda {

using Stream = CUstream_st*;      // cudaStream_t
using LaunchError = const char*;  // null, or what the CUDA runtime says

struct Device {
  int32_t capability;  // 10 * major + minor
  int32_t processors;  // streaming multiprocessors
};

// Of the current device; asked once a device.
LaunchError current_device(Device& device);

}  // namespace stream_r1::cuda
