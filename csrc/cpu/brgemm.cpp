#include "cpu/brgemm.h"

#include <dlfcn.h>

#include "cpu/isa.h"

namespace stream_r1 {
namespace {

// Torch's functions as its libraries name them. They are in no stable ABI: a torch without one of them has no
// `amx`, and the kernels multiply themselves.
struct TorchBrgemm {
  bool (*init_amx)();
  void (*release)(bool is_packed);
  // rows, columns, depth, strides, add, bfloat16 matrices, float32 sums, `b` is packed in pairs
  void (*multiply)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const void*, const void*,
                   float*, bool);

  bool complete() const { return init_amx != nullptr && release != nullptr && multiply != nullptr; }
};

template <class Function>
void look_up(const char* name, Function*& function) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  if (symbol == nullptr)
    if (void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, name);
  function = reinterpret_cast<Function*>(symbol);
}

const TorchBrgemm& torch_brgemm() {
  static const TorchBrgemm found = [] {
    TorchBrgemm torch{};
    look_up("_ZN2at3cpu8init_amxEv", torch.init_amx);
    look_up("_ZN2at6native7cpublas14brgemm_releaseEb", torch.release);
    look_up("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", torch.multiply);
    return torch;
  }();
  return found;
}

void brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t b_stride,
            int64_t c_stride, bool add, const void* a, const void* b, float* c) {
  torch_brgemm().multiply(rows, columns, depth, a_stride, b_stride, c_stride, add, a, b, c, true);
}

}  // namespace

bool brgemm_has_tiles() { return torch_brgemm().complete() && torch_brgemm().init_amx(); }

Brgemm* pick_brgemm() { return cpu_isa() == Isa::amx && torch_brgemm().complete() ? &brgemm : nullptr; }

void release_brgemm() {
  if (pick_brgemm() != nullptr) torch_brgemm().release(true);
}

}  // namespace stream_r1
