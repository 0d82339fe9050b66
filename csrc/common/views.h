// What a kernel is told about a tensor whose element type it learns at run time; plain C++, for op files and
// kernel files.

#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace stream_r1 {

// As wide as a pointer: what holds both has no padding, and a launch's arguments are the same bytes each
// time.
enum class Element : int64_t { float32, bfloat16, float16 };

struct Source {
  const void* data;
  Element element;
};

struct Target {
  void* data;
  Element element;
};

// Strides in elements of a tensor of planes [B, F, C] x [plane]; a plane lies in memory without gaps.
struct Planes {
  int64_t batch_stride, frame_stride, channel_stride;

  STREAM_R1_HOST_DEVICE int64_t offset(int64_t batch, int64_t frame, int64_t channel) const {
    return batch * batch_stride + frame * frame_stride + channel * channel_stride;
  }
};

}  // namespace stream_r1
