// The arithmetic that the CPU and the CUDA kernels share: merging moments, activations and their derivatives, the
// coefficients of the gradient. Scalar functions without state; loops, memory and threads belong to the kernels.
//
// Every function agrees with bnfuse/reference.py, at kinks and for NaN too. Everything sits in an unnamed namespace:
// this header is compiled once for each CPU instruction set, and no two of these copies may be taken for one another.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BNFUSE_INLINE __host__ __device__ __forceinline__
#else
#define BNFUSE_INLINE inline __attribute__((always_inline))
#endif

namespace bnfuse {

// The activations, in the order of reference.ACTIVATIONS.
enum class Act : int32_t { identity, relu, relu6, leaky_relu, silu, hardswish };

namespace {

// ---- moments ----

// How a set of `count_b` elements enters one of `count_a` (Chan, Golub, LeVeque 1979).
struct MergeWeights {
  double toward;  // count_b / (count_a + count_b)
  double cross;   // count_a · count_b / (count_a + count_b)
};

BNFUSE_INLINE MergeWeights merge_weights(double count_a, double count_b) {
  const double toward = count_b > 0 ? count_b / (count_a + count_b) : 0;
  return {toward, count_a * toward};
}

// (mean, m2) ← moments of the union, m2 = Σ(x − mean)².
BNFUSE_INLINE void merge_moments(double& mean, double& m2, double mean_b, double m2_b, MergeWeights weights) {
  const double delta = mean_b - mean;
  mean += delta * weights.toward;
  m2 += m2_b + delta * delta * weights.cross;
}

// m2 of 1/share elements from s = Σ(x − p) and q = Σ(x − p)² about a pivot p near their mean.
BNFUSE_INLINE double centred_m2(double s, double q, double share) {
  const double m2 = q - s * (s * share);
  return m2 < 0 ? 0 : m2;  // rounding alone makes it negative; NaN stays
}

BNFUSE_INLINE bool is_finite(double x) { return x - x == 0; }

// ---- activations; `slope` is leaky ReLU's ----

template <typename To, typename From>
BNFUSE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

BNFUSE_INLINE double exponential(double x) { return ::exp(x); }

// e^x to about 1 ulp without a branch or a call, so that loops over it vectorise. Below −87.3 it stays at e^−87.3,
// which no caller can tell from 0; overflow gives inf, NaN stays.
BNFUSE_INLINE float exponential(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);  // a few instructions around the hardware's 2ˣ
#else
  float clamped = x < -87.3f ? -87.3f : x;
  clamped = clamped > 88.3f ? 88.3f : clamped;
  const float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, kept in the low bits
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;  // x = n·ln 2 + r, |r| ≤ ½ ln 2
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // (e^r − 1 − r)/r², the minimax polynomial of Cephes
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2ⁿ
  const float e = (p * r * r + r + 1.0f) * power;
  return x > 88.72283f ? INFINITY : e;
#endif
}

template <Act ACT, typename A>
BNFUSE_INLINE A activation(A z, A slope) {
  if (ACT == Act::relu) return z < 0 ? A(0) : z;
  if (ACT == Act::relu6) {
    const A above = z < 0 ? A(0) : z;
    return above > 6 ? A(6) : above;
  }
  if (ACT == Act::leaky_relu) return z > 0 ? z : z * slope;
  if (ACT == Act::silu) return z / (A(1) + exponential(-z));
  if (ACT == Act::hardswish) {
    const A above = z < -3 ? A(0) : z + A(3);
    return z * (above > 6 ? A(6) : above) / A(6);
  }
  return z;
}

// Whether the derivative has two values, of which one bit an element tells.
BNFUSE_INLINE constexpr bool is_two_slope(Act act) { return act == Act::relu || act == Act::relu6 || act == Act::leaky_relu; }

// Whether z stands where a two-slope activation's derivative is 1; of a vector, for each lane.
template <Act ACT, typename A>
BNFUSE_INLINE auto on_upper_slope(A z) {
  return ACT == Act::relu6 ? (z > 0) & (z < 6) : z > 0;
}

template <Act ACT, typename A>
BNFUSE_INLINE A derivative(A z, A slope) {
  if (ACT == Act::relu || ACT == Act::relu6) return on_upper_slope<ACT>(z) ? A(1) : A(0);
  if (ACT == Act::leaky_relu) return on_upper_slope<ACT>(z) ? A(1) : slope;
  if (ACT == Act::silu) {
    const A s = A(1) / (A(1) + exponential(-z));
    return s * (A(1) + z * (A(1) - s));
  }
  if (ACT == Act::hardswish) {
    const A inner = z < 3 ? z / A(3) + A(0.5) : A(1);
    return z > -3 ? inner : A(0);
  }
  return A(1);
}

// The slope below the kink, which a mask bit of 0 stands for.
BNFUSE_INLINE double lower_slope(Act act, double slope) { return act == Act::leaky_relu ? slope : 0.0; }

// ---- the gradient through the moments: a + b·(x − mean) with a = ∂L/∂mean / M, b = 2·∂L/∂var / M ----

template <typename A>
BNFUSE_INLINE A mean_coefficient(A dmean, A count) {
  return dmean / count;
}

template <typename A>
BNFUSE_INLINE A var_coefficient(A dvar, A count) {
  return A(2) * dvar / count;
}

}  // namespace
}  // namespace bnfuse
