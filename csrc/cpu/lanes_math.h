#pragma once

#include "lanes.h"
#include "sdft_kernels/divergence_math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// exp, expm1, log1p and tanh of vector lanes, to an ulp or two, without a call. NaN survives all of them.
namespace sdft::SDFT_ISA {

// a * b + c, rounded once where the processor can. Explicit, since these files are compiled without contraction: a
// compiler that fuses z = a * slope with z - max in one loop and not in another gives two different z.
static inline vfloat fused(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

static inline vfloat fused(vfloat a, vfloat b, float c) { return fused(a, b, broadcast(c)); }

template <>
struct Math<vfloat> {
  using Element = float;

  static vfloat where(vint chosen, vfloat a, vfloat b) { return chosen ? a : b; }

  // For x <= 88 (a pivoted logit is at most 0, and GAP_LIMIT 80). Below the least normal number it is exactly 0.
  // 2^n e^r with r = x - n log 2 in two steps (Cody and Waite) and Cephes' polynomial.
  static vfloat exp(vfloat x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const vfloat shifted = fused(x, broadcast(1.44269504f), ROUND);
    const vfloat n = shifted - ROUND;
    vfloat r = fused(n, broadcast(-0.693359375f), x);
    r = fused(n, broadcast(2.12194440e-4f), r);
    vfloat p = fused(broadcast(1.9875691500e-4f), r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(r * r, p, r + 1.0f);
    const vuint power = (bits_as<vuint>(shifted) << 23) + 0x3f800000u;
    return where(x < -87.33654f, vfloat{}, p * bits_as<vfloat>(power));
  }

  static vfloat expm1(vfloat x) {
    vfloat small = fused(x, broadcast(1.4880952e-4f), 1.1904762e-3f);
    small = fused(x, small, 8.3333333e-3f);
    small = fused(x, small, 0.05f);
    small = fused(x, small, 0.25f);
    small = fused(x, small, 1.0f);
    small = fused(x * 0.16666667f, small, 0.5f);
    small = x * fused(x, small, 1.0f);
    return where(magnitude(x) < 0.5f, small, exp(x) - 1.0f);
  }

  // Below 1/2 by 2 atanh(w / (2 + w)), where 1 + w would round away what is small in w.
  static vfloat log1p(vfloat w) {
    const vfloat s = w / (w + 2.0f), t = s * s;
    vfloat series = fused(t, broadcast(0.090909091f), 0.11111111f);
    series = fused(t, series, 0.14285714f);
    series = fused(t, series, 0.2f);
    series = fused(t, series, 0.33333333f);
    series = fused(t, series, 1.0f);
    return where(magnitude(w) < 0.5f, 2.0f * s * series, log(w + 1.0f));
  }

  // 1 - 2 e / (1 + e) with e = e^-2|x|, and below 0.625, where that cancels, Cephes' polynomial.
  static vfloat tanh(vfloat x) {
    const vfloat e = exp(magnitude(x) * -2.0f);
    const vfloat t = 1.0f - 2.0f * e / (e + 1.0f), q = x * x;
    vfloat p = fused(q, broadcast(-5.70498872745e-3f), 2.06390887954e-2f);
    p = fused(p, q, -5.37397155531e-2f);
    p = fused(p, q, 1.33314422036e-1f);
    p = fused(p, q, -3.33332819422e-1f);
    return where(magnitude(x) < 0.625f, fused(p * q, x, x), where(x < 0.0f, -t, t));
  }

 private:
  static vfloat magnitude(vfloat x) {
    const vuint bits = bits_as<vuint>(x) & 0x7fffffffu;
    return bits_as<vfloat>(bits);
  }

  // For normal x > 0, or NaN: exponent and mantissa in [sqrt(1/2), sqrt(2)), Cephes' polynomial.
  static vfloat log(vfloat x) {
    const vint bits = bits_as<vint>(x);
    const vint shifted = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2)
    const vint mantissa = bits - (shifted << 23);
    const vfloat n = __builtin_convertvector(shifted, vfloat), m = bits_as<vfloat>(mantissa) - 1.0f;
    vfloat p = fused(broadcast(7.0376836292e-2f), m, -1.1514610310e-1f);
    p = fused(p, m, 1.1676998740e-1f);
    p = fused(p, m, -1.2420140846e-1f);
    p = fused(p, m, 1.4249322787e-1f);
    p = fused(p, m, -1.6668057665e-1f);
    p = fused(p, m, 2.0000714765e-1f);
    p = fused(p, m, -2.4999993993e-1f);
    p = fused(p, m, 3.3333331174e-1f);
    const vfloat square = m * m;
    vfloat result = fused(p * m, square, n * -2.12194440e-4f);
    result = fused(square, broadcast(-0.5f), result);
    result = fused(n, broadcast(0.693359375f), result + m);
    return where(x == x, result, x);
  }
};

}  // namespace sdft::SDFT_ISA
