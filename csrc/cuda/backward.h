// The backward pass on a CUDA device, as its launcher takes it.
#pragma once

#include "../elements.h"
#include "runtime.h"
#include "walk.h"

namespace bnfuse {

// A is double where x is float64, else float.
struct BackwardPass {
  Walk walk;
  Act act;
  double slope;
  const void* dy;               // like x, or null: only the gradient through the moments is wanted
  const void* x;                // [N, C, *spatial]
  const void* residual;         // like x, or null
  const uint8_t* mask;          // or null: act' comes from x and residual
  const void* scale;            // A [C]; null where dy is
  const void* shift;            // A [C]; null where dy is
  const void* mean;             // A [G, C]
  const void* dmean;            // A [G, C] or null
  const void* dvar;             // A [G, C] or null
  const int64_t* group_starts;  // [G + 1]
  void* dx;                     // like x; may be dy
  void* dresidual;              // like x, or null
};

// Where act' comes from.
enum class Derivative {
  one,       // there is none, or no dy
  mask,      // two slopes
  relu,      // x, for ReLU
  any,       // x, for any activation
  residual,  // x and the residual, which is looked at here alone
};

inline Derivative derivative_of(const BackwardPass& backward) {
  if (!backward.dy || (backward.act == Act::identity && !backward.mask)) return Derivative::one;
  if (backward.mask) return Derivative::mask;
  if (backward.residual) return Derivative::residual;
  return backward.act == Act::relu ? Derivative::relu : Derivative::any;
}

// Whether the kernel for this needs few registers.
constexpr bool backward_is_lean(Derivative derivative) {
  return derivative != Derivative::any && derivative != Derivative::residual;
}

// One launch, on `stream`.
void backward_on_cuda(DType dtype, const BackwardPass& backward, Stream stream);

}  // namespace bnfuse
