// Kernel files (<op>_kernel.cpp) are compiled once for every instruction set, with STREAM_R1_ISA naming the
// namespace that the copy lives in. This header is how a copy is declared, defined and picked.
//
//   <op>_kernel.h     struct FooArgs {...};                       plain C++, no torch headers
//                     STREAM_R1_KERNEL(foo, void(const FooArgs&, int64_t begin, int64_t end));
//   <op>_kernel.cpp   namespace stream_r1::STREAM_R1_ISA { void foo(const FooArgs& args, int64_t begin,
//   int64_t end) {...} } <op>.cpp          auto* foo = pick_foo();  parallel_for(0, n, grain, [&](int64_t
//   b, int64_t e) { foo(args, b, e); });
//
// Helpers inside a kernel file belong into the same namespace: an inline function outside it would exist once
// an instruction set under one name, and the linker keeps only one of them.

#pragma once

#include <cstdint>

namespace stream_r1 {

// amx: avx512_bf16, with products of bfloat16 on tiles by way of torch (cpu/brgemm.h).
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// The best instruction set that was built and that this machine has; the environment variable STREAM_R1_ISA
// lowers it, and an unknown name in it is an error. `amx` may be wished for on any machine with avx512_bf16:
// torch finds another way.
Isa cpu_isa();
const char* isa_name(Isa isa);

template <class Function>
struct KernelSignature {
  using type = Function;
};

}  // namespace stream_r1

#ifdef STREAM_R1_HAS_AVX2
#define STREAM_R1_DECLARE_AVX2(name, ...)  \
  namespace avx2 {                         \
  KernelSignature<__VA_ARGS__>::type name; \
  }
#define STREAM_R1_PICK_AVX2(name) \
  if (isa == Isa::avx2) return &avx2::name;
#else
#define STREAM_R1_DECLARE_AVX2(name, ...)
#define STREAM_R1_PICK_AVX2(name)
#endif

#ifdef STREAM_R1_HAS_AVX512
#define STREAM_R1_DECLARE_AVX512(name, ...) \
  namespace avx512 {                        \
  KernelSignature<__VA_ARGS__>::type name;  \
  }
#define STREAM_R1_PICK_AVX512(name) \
  if (isa >= Isa::avx512) return &avx512::name;
#else
#define STREAM_R1_DECLARE_AVX512(name, ...)
#define STREAM_R1_PICK_AVX512(name)
#endif

#ifdef STREAM_R1_HAS_AVX512_BF16
#define STREAM_R1_DECLARE_AVX512_BF16(name, ...) \
  namespace avx512_bf16 {                        \
  KernelSignature<__VA_ARGS__>::type name;       \
  }
#define STREAM_R1_PICK_AVX512_BF16(name) \
  if (isa >= Isa::avx512_bf16) return &avx512_bf16::name;
#else
#define STREAM_R1_DECLARE_AVX512_BF16(name, ...)
#define STREAM_R1_PICK_AVX512_BF16(name)
#endif

// Declares `name` in every instruction set's namespace, and pick_name(), which returns the one to call. Use
// at namespace scope inside `namespace stream_r1`.
#define STREAM_R1_KERNEL(name, ...) STREAM_R1_DECLARE_KERNEL(name, , __VA_ARGS__)

// The same for a kernel that multiplies matrices: its files (see KERNEL_FILES in setup.py) are compiled once
// more, for machines with products of bfloat16. The other kernels of such a machine are those of avx512.
#define STREAM_R1_KERNEL_BF16(name, ...)           \
  STREAM_R1_DECLARE_AVX512_BF16(name, __VA_ARGS__) \
  STREAM_R1_DECLARE_KERNEL(name, STREAM_R1_PICK_AVX512_BF16(name), __VA_ARGS__)

#define STREAM_R1_DECLARE_KERNEL(name, pick_first, ...)                                      \
  namespace baseline {                                                                       \
  KernelSignature<__VA_ARGS__>::type name;                                                   \
  }                                                                                          \
  STREAM_R1_DECLARE_AVX2(name, __VA_ARGS__)                                                  \
  STREAM_R1_DECLARE_AVX512(name, __VA_ARGS__)                                                \
  inline KernelSignature<__VA_ARGS__>::type* pick_##name() {                                 \
    [[maybe_unused]] const Isa isa = cpu_isa();                                              \
    pick_first STREAM_R1_PICK_AVX2(name) STREAM_R1_PICK_AVX512(name) return &baseline::name; \
  }                                                                                          \
  static_assert(true)
