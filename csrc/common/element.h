// The element types that the CPU kernels read and write; sums are always in float.

#pragma once

namespace stream_r1 {

enum class Element { float32, bfloat16, float16 };

}  // namespace stream_r1
