// What a kernel is told about a tensor whose element type it learns at run time; plain C++, for op files and
// kernel files.

#pragma once

#include <cstdint>

namespace stream_r1 {

enum class Element : int8_t { float32, bfloat16, float16 };

struct Source {
  const void* data = nullptr;
  Element element = Element::float32;
};

struct Target {
  void* data = nullptr;
  Element element = Element::float32;
};

}  // namespace stream_r1
