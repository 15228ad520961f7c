// The distance of one group's moments at one site from their targets, with its gradient: a block's work.
#pragma once

#include "../loss.h"
#include "forward.h"
#include "runtime.h"
#include "walk.h"

namespace bnfuse {
namespace {

// The sums of a and b over all threads of the block, in a fixed order, in every thread. `scratch` [2 · 32] is shared.
BNFUSE_DEVICE void add_up_block(double& a, double& b, double* scratch) {
  for (int distance = 1; distance < 32; distance *= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, distance);
    b += __shfl_xor_sync(0xffffffffu, b, distance);
  }
  const int warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = a;
    scratch[32 + threadIdx.x / 32] = b;
  }
  __syncthreads();
  a = b = 0;
  for (int warp = 0; warp < warps; ++warp) {
    a += scratch[warp];
    b += scratch[32 + warp];
  }
}

// One group at one site; everything is [C]. `weight` is that of the gradient.
template <typename A>
struct SiteArguments {
  const A* mean;
  const A* var;
  const A* target_mean;  // null: the group's class is none of the table's, and everything becomes NaN
  const A* target_var;
  int64_t channels;
  double weight;
  A* dmean;
  A* dvar;
};

template <typename A>
BNFUSE_DEVICE ChannelTerms terms_of_channel(const SiteArguments<A>& site, int64_t channel, const LossOptions& options) {
  // Other blocks of this launch may have written the moments.
  const double mean = static_cast<const volatile A*>(site.mean)[channel];
  const double var = static_cast<const volatile A*>(site.var)[channel];
  const double target_mean = site.target_mean ? double(site.target_mean[channel]) : double(NAN);
  const double target_var = site.target_mean ? double(site.target_var[channel]) : double(NAN);
  return channel_terms(mean, var, target_mean, target_var, options);
}

// The distance, in every thread of the block; writes the gradient.
template <typename A>
BNFUSE_DEVICE double distance_and_gradient(const SiteArguments<A>& site, const LossOptions& options, double* scratch) {
  double mean_sum = 0, var_sum = 0;
  for (int64_t c = threadIdx.x; c < site.channels; c += blockDim.x) {
    const ChannelTerms terms = terms_of_channel(site, c, options);
    mean_sum += terms.mean.value;
    var_sum += terms.var.value;
  }
  add_up_block(mean_sum, var_sum, scratch);
  const SiteDistance total = site_distance(mean_sum, var_sum, site.channels, options);
  for (int64_t c = threadIdx.x; c < site.channels; c += blockDim.x) {
    const ChannelTerms terms = terms_of_channel(site, c, options);
    site.dmean[c] = A(site.weight * total.mean_factor * terms.mean.slope);
    site.dvar[c] = A(site.weight * total.var_factor * terms.var.slope);
  }
  return total.distance;
}

// The targets' row for a group, or −1 for a class that the table does not hold.
BNFUSE_DEVICE int64_t target_row(const int64_t* classes, int64_t table_rows, int64_t group) {
  const int64_t row = classes ? classes[group] : 0;
  return row >= 0 && row < table_rows ? row : -1;
}

// Whether this block is the last of `blocks` that get here; it then sees what all of them have written to global memory.
BNFUSE_DEVICE bool is_last_block(int32_t* counter, int32_t blocks, int32_t* shared_flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared_flag = atomicAdd(counter, 1) == blocks - 1;
  __syncthreads();
  const bool last = *shared_flag;
  __threadfence();
  return last;
}

// The end of the finishing kernel where targets are given: the last block of each group finds the group's distance, and the
// last of these the loss.
template <typename A>
BNFUSE_DEVICE void finish_loss(const Finish& f, int64_t group, int32_t blocks_a_group) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  int32_t* flag = reinterpret_cast<int32_t*>(scratch + 64);
  if (!is_last_block(f.counters + 1 + group, blocks_a_group, flag)) return;
  const int64_t channels = f.walk.channels, row = target_row(f.classes, f.table_rows, group), at = group * channels;
  const A* target_mean = static_cast<const A*>(f.target_mean) + row * channels;
  const A* target_var = static_cast<const A*>(f.target_var) + row * channels;
  const SiteArguments<A> site{static_cast<const A*>(f.mean) + at,
                              static_cast<const A*>(f.var) + at,
                              row < 0 ? nullptr : target_mean,
                              target_var,
                              channels,
                              f.weight / f.walk.groups,
                              static_cast<A*>(f.dmean) + at,
                              static_cast<A*>(f.dvar) + at};
  const double distance = distance_and_gradient(site, f.options, scratch);
  if (threadIdx.x == 0) f.distances[group] = distance;
  if (!is_last_block(f.counters, f.walk.groups, flag)) return;
  double sum = 0, unused = 0;
  for (int32_t g = threadIdx.x; g < f.walk.groups; g += blockDim.x)
    sum += static_cast<const volatile double*>(f.distances)[g];
  add_up_block(sum, unused, scratch);
  if (threadIdx.x == 0) *static_cast<A*>(f.loss) = A(f.weight / f.walk.groups * sum);
}

constexpr int64_t LOSS_SHARED_BYTES = 64 * sizeof(double) + sizeof(double);

}  // namespace
}  // namespace bnfuse
