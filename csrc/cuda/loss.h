// The loss on a CUDA device, as its launcher takes it.
#pragma once

#include <vector>

#include "../loss.h"
#include "runtime.h"

namespace bnfuse {

struct LossSite {
  const void* mean;  // A [G, C]
  const void* var;   // A [G, C]
  int64_t channels;  // C
  int64_t column;    // of the site's first channel among all sites'
};

constexpr int SITES_A_LAUNCH = 96;  // so that the arguments of a launch stay within 4 KiB

struct Loss {
  LossOptions options;
  int64_t groups, sites, width;  // G, S, T = ΣC
  const void* target_mean;       // A [K, T]
  const void* target_var;        // A [K, T]
  const int64_t* classes;        // [G], or null: K = 1
  int64_t table_rows;            // K
  const void* site_weights;      // A [S], or null:
  double weight;                 // of the one site
  void* loss;                    // A []
  void* distances;               // A [G, S]
  double* exact_distances;       // [G, S], workspace: what the loss is the sum of
  void* dmean;                   // A [G·T], every site's [G, C] one after the other
  void* dvar;                    // the same
  int64_t first_site;            // of this launch
  LossSite site[SITES_A_LAUNCH];
};

// `loss` but for its sites, and these: one launch for SITES_A_LAUNCH of them, and one that adds up.
void loss_on_cuda(bool is_float64, Loss loss, const std::vector<LossSite>& sites, Stream stream);

}  // namespace bnfuse
