// v / (1 + e^-u). Only for kernel files (see isa.h).

#pragma once

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {

// v times the sigmoid of u, to a few units in the last place; not a number stays what it is. Where the
// sigmoid is below about 2^-127 it counts as 0, so that v = -inf gives NaN, as torch's does.
inline Vec times_sigmoid(Vec v, Vec u) {
  const Vec exponent = u * -1.44269504f;
#if defined(__AVX512F__)
  const Vec most = splat(126.0f);
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)exponent, (__m512)most, _CMP_NGT_UQ);
  const Vec denominator = 1.0f + exp2((Vec)_mm512_min_ps((__m512)most, (__m512)exponent));
  const Vec guess =
      (Vec)_mm512_rcp14_ps((__m512)denominator);  // and a step of Newton's: a division is slower
  return v * (Vec)_mm512_maskz_mul_ps(counts, (__m512)guess, (__m512)(2.0f - denominator * guess));
#else
  const Vec most = splat(128.0f);  // of which exp2 makes inf
  return v / (1.0f + exp2(exponent > most ? most : exponent));
#endif
}

}  // namespace stream_r1::STREAM_R1_ISA
