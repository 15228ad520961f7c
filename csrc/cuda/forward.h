// The forward pass on a CUDA device, as its launcher takes it: pointers into device memory, and nothing of tensors.
#pragma once

#include "../elements.h"
#include "../loss.h"
#include "act_kind.h"
#include "runtime.h"
#include "walk.h"

namespace bnfuse {

// A is double where x is float64, else float.
struct ForwardPass {
  Walk walk;
  Act act;
  double slope;
  const void* x;                // [N, C, *spatial]
  const void* residual;         // like x, or null
  const void* scale;            // A [C]
  const void* shift;            // A [C]
  const int64_t* group_starts;  // [G + 1]
  void* y;                      // like x, or null: only the moments are wanted
  uint8_t* mask;                // reference.pack_mask's layout, or null: none is needed
  void* partials;               // (mean, Σ(x − mean)²) A [chunks, C, parts, 2]
  int32_t* counters;            // [1 + G], or null: no targets are given
};

// The second launch: partial moments into moments and, with targets, those into the loss of this site.
struct Finish {
  Walk walk;
  const void* partials;         // A [chunks, C, parts, 2]
  const int64_t* group_starts;  // [G + 1]
  void* mean;                   // A [G, C]
  void* var;                    // A [G, C]
  int32_t team;                 // threads that merge a channel's partial moments, a power of two

  // What follows is for targets alone.
  int32_t* counters;            // [1 + G], zero: groups that are done, and blocks that are done with each group
  const void* target_mean;      // A [K, C]
  const void* target_var;       // A [K, C]
  const int64_t* classes;       // [G], or null: K = 1
  int64_t table_rows;           // K
  double weight;
  LossOptions options;
  double* distances;            // [G], workspace
  void* loss;                   // A []
  void* dmean;                  // A [G, C]
  void* dvar;                   // A [G, C]
};

// Whether the kernel for these needs few registers.
constexpr bool forward_is_lean(ActKind kind, bool residual, bool planes) {
  return residual ? kind == ActKind::relu && !planes : kind != ActKind::any;
}

// Both launches, on `stream`.
void forward_on_cuda(DType dtype, const ForwardPass& forward, const Finish& finish, Stream stream);

}  // namespace bnfuse
