// The activations that kernels are compiled for: the two that networks are made of, and any, which is a run-time argument.
#pragma once

#include "../bn_math.h"

namespace bnfuse {

enum class ActKind { identity, relu, any };

inline ActKind kind_of(Act act) {
  return act == Act::identity ? ActKind::identity : act == Act::relu ? ActKind::relu : ActKind::any;
}

}  // namespace bnfuse
