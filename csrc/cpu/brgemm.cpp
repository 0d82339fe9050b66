#include "cpu/brgemm.h"

#include <ATen/native/CPUBlas.h>

#include "cpu/isa.h"

namespace stream_r1 {
namespace {

void brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t b_stride,
            int64_t c_stride, bool add, const void* a, const void* b, float* c) {
  at::native::cpublas::brgemm(rows, columns, depth, a_stride, b_stride, c_stride, add,
                              static_cast<const at::BFloat16*>(a), static_cast<const at::BFloat16*>(b), c);
}

}  // namespace

Brgemm* pick_brgemm() { return cpu_isa() == Isa::amx ? &brgemm : nullptr; }

void release_brgemm() {
  if (cpu_isa() == Isa::amx) at::native::cpublas::brgemm_release();
}

}  // namespace stream_r1
