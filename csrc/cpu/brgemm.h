// Products of bfloat16 matrices by torch's own kernels (oneDNN), which know AMX's tiles. Plain C++, for op
// files and kernel files: kernels get it as a pointer, as they include no torch header.

#pragma once

#include <cstdint>

namespace stream_r1 {

// c [rows, columns] = or += a [rows, depth] b, summed in float32; `b` has pairs along the depth, [depth / 2,
// columns, 2]. Strides are in elements, of b in pairs.
using Brgemm = void(int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t b_stride,
                    int64_t c_stride, bool add, const void* a, const void* b, float* c);

// Whether this machine has AMX, this process may use it, and this torch has the kernels.
bool brgemm_has_tiles();

// Null where kernels multiply as fast themselves.
Brgemm* pick_brgemm();

// To be called by every thread that has multiplied, when it is done: gives the tiles back.
void release_brgemm();

}  // namespace stream_r1
