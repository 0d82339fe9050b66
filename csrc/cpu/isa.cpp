#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/registration.h"
#include "common/tensors.h"
#include "cpu/brgemm.h"

namespace stream_r1 {
namespace {

Isa best_isa() {
#if defined(__x86_64__) && defined(STREAM_R1_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(STREAM_R1_HAS_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) return brgemm_has_tiles() ? Isa::amx : Isa::avx512_bf16;
#endif
    return Isa::avx512;
  }
#endif
#if defined(__x86_64__) && defined(STREAM_R1_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa lowered_by_environment(Isa best) {
  const char* wish = std::getenv("STREAM_R1_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  const Isa highest = best == Isa::avx512_bf16 ? Isa::amx : best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
    if (std::strcmp(wish, isa_name(isa)) == 0) return std::min(isa, highest);
  throw std::invalid_argument(
      message("STREAM_R1_ISA: expected baseline, avx2, avx512, avx512_bf16 or amx, got '", wish, "'"));
}

std::string cpu_isa_name() { return isa_name(cpu_isa()); }

}  // namespace

Isa cpu_isa() {
  static const Isa isa = lowered_by_environment(best_isa());
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace stream_r1

STREAM_R1_REGISTER(CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&stream_r1::cpu_isa_name)); }
