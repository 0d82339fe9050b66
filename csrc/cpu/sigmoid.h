// v / (1 + e^-u). Only for kernel files (see isa.h).

#pragma once

#include "cpu/vectors.h"

namespace stream_r1::STREAM_R1_ISA {

// v times the sigmoid of u, to a few units in the last place; not a number stays what it is. Where the
// sigmoid is below 2^-126 it counts as 0, so that v = -inf gives NaN, as torch's does.
inline Vec times_sigmoid(Vec v, Vec u) {
  const Vec most = splat(126.0f), exponent = u * -1.44269504f;
#if defined(__AVX512F__)
  const Vec denominator = 1.0f + exp2((Vec)_mm512_min_ps((__m512)most, (__m512)exponent));
  const Vec guess =
      (Vec)_mm512_rcp14_ps((__m512)denominator);  // and a step of Newton's: a division is slower
  const Vec result = v * (guess * (2.0f - denominator * guess));
#else
  const Vec result = v / (1.0f + exp2(exponent > most ? most : exponent));
#endif
  return exponent > most ? v * 0.0f : result;
}

}  // namespace stream_r1::STREAM_R1_ISA
