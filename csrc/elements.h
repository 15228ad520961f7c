// The element types of x: stored as T, computed as Accumulator<T>, float or double. For the CPU and the CUDA kernels alike.
//
// In an unnamed namespace for the reason that bn_math.h gives.
#pragma once

#include <cstdint>

#include "bn_math.h"

namespace bnfuse {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

BNFUSE_INLINE double widen(double value) { return value; }
BNFUSE_INLINE float widen(float value) { return value; }
BNFUSE_INLINE float widen(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

BNFUSE_INLINE float widen(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;  // exponent and mantissa where float has them
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t infinite = magnitude + (224u << 23);              // inf and NaN
  // 2⁻¹⁴·(1 + mantissa) − 2⁻¹⁴: exact, and right too where subnormal floats are flushed to zero.
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  uint32_t bits = magnitude < (1u << 23) ? bit_cast<uint32_t>(subnormal) : normal;
  bits = magnitude >= (31u << 23) ? infinite : bits;
  return bit_cast<float>(bits | uint32_t(value.bits & 0x8000) << 16);
#endif
}

BNFUSE_INLINE void narrow(double value, double& stored) { stored = value; }
BNFUSE_INLINE void narrow(float value, float& stored) { stored = value; }

BNFUSE_INLINE void narrow(float value, BFloat16& stored) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  stored.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

BNFUSE_INLINE void narrow(float value, Half& stored) {  // to nearest, ties to even
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding ½ lets the float unit round to a multiple of 2⁻²⁴, a half's smallest step.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  // Selected by bit masks: around conditional expressions the compiler builds branches, and then does not vectorise.
  const uint32_t is_small = 0u - uint32_t(magnitude < (113u << 23));
  const uint32_t is_large = 0u - uint32_t(magnitude >= (143u << 23));  // 2¹⁶ and above, inf, NaN
  const uint32_t is_nan = 0u - uint32_t(magnitude > 0x7f800000u);
  const uint32_t finite = (subnormal & is_small) | (normal & ~is_small);
  const uint32_t half = (finite & ~is_large) | (0x7c00u & is_large) | (0x0200u & is_nan);
  stored.bits = uint16_t(half | (bits & 0x80000000u) >> 16);
#endif
}

}  // namespace
}  // namespace bnfuse
