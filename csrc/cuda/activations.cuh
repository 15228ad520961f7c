// Activations and their derivatives on vectors. One that no kernel is compiled for is looked at once a vector.
#pragma once

#include "act_kind.h"
#include "vectors.cuh"

namespace bnfuse {
namespace {

template <Act ACT, typename A>
BNFUSE_DEVICE void activate_as(A (&z)[VECTOR], A slope) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) z[i] = activation<ACT>(z[i], slope);
}

// z ← act(z)
template <ActKind KIND, typename A>
BNFUSE_DEVICE void activate(A (&z)[VECTOR], Act act, A slope) {
  if (KIND == ActKind::identity) return;
  if (KIND == ActKind::relu) return activate_as<Act::relu>(z, slope);
  switch (act) {
    case Act::identity: break;
    case Act::relu: activate_as<Act::relu>(z, slope); break;
    case Act::relu6: activate_as<Act::relu6>(z, slope); break;
    case Act::leaky_relu: activate_as<Act::leaky_relu>(z, slope); break;
    case Act::silu: activate_as<Act::silu>(z, slope); break;
    case Act::hardswish: activate_as<Act::hardswish>(z, slope); break;
  }
}

template <Act ACT, typename A>
BNFUSE_DEVICE void differentiate_as(A (&z)[VECTOR], A slope) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) z[i] = derivative<ACT>(z[i], slope);
}

// z ← act'(z), of an activation whose derivative depends on z: identity's does not, and no kernel asks (Derivative::one).
template <ActKind KIND, typename A>
BNFUSE_DEVICE void differentiate(A (&z)[VECTOR], Act act, A slope) {
  if (KIND == ActKind::relu) return differentiate_as<Act::relu>(z, slope);
  switch (act) {
    case Act::identity: break;
    case Act::relu: differentiate_as<Act::relu>(z, slope); break;
    case Act::relu6: differentiate_as<Act::relu6>(z, slope); break;
    case Act::leaky_relu: differentiate_as<Act::leaky_relu>(z, slope); break;
    case Act::silu: differentiate_as<Act::silu>(z, slope); break;
    case Act::hardswish: differentiate_as<Act::hardswish>(z, slope); break;
  }
}

// Bit i: whether z[i] stands where the two-slope activation's derivative is 1.
template <ActKind KIND, typename A>
BNFUSE_DEVICE uint32_t upper_slope_bits(const A (&z)[VECTOR], Act act) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const bool relu6 = KIND == ActKind::any && act == Act::relu6;
    const bool upper = relu6 ? on_upper_slope<Act::relu6>(z[i]) : on_upper_slope<Act::relu>(z[i]);
    bits |= uint32_t(upper) << i;
  }
  return bits;
}

}  // namespace
}  // namespace bnfuse
