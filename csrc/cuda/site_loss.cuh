// The distance of one group's moments at one site from their targets, with its gradient: a block's work.
#pragma once

#include "../loss.h"
#include "forward.h"
#include "runtime.h"
#include "walk.h"

namespace bnfuse {

constexpr int SMALL_THREADS = 256;  // of a block of the kernels that deal with moments alone

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

constexpr int CHANNELS_HELD = 8;  // by a thread: of their targets none is waited for before all are asked for

// Calls use(h, channel, terms) for the channels first + h·threads of this thread, h < CHANNELS_HELD, that the site has.
template <typename A, typename Use>
BNFUSE_DEVICE void for_channels(const SiteArguments<A>& site, int64_t first, const LossOptions& options, const Use& use) {
  A mean[CHANNELS_HELD], var[CHANNELS_HELD], target_mean[CHANNELS_HELD], target_var[CHANNELS_HELD];
#pragma unroll
  for (int h = 0; h < CHANNELS_HELD; ++h) {
    const int64_t c = first + h * int64_t(blockDim.x);
    if (c >= site.channels) continue;
    mean[h] = load_shared_by_blocks(site.mean + c);
    var[h] = load_shared_by_blocks(site.var + c);
    target_mean[h] = site.target_mean ? site.target_mean[c] : A(NAN);
    target_var[h] = site.target_mean ? site.target_var[c] : A(NAN);
  }
#pragma unroll
  for (int h = 0; h < CHANNELS_HELD; ++h) {
    const int64_t c = first + h * int64_t(blockDim.x);
    if (c < site.channels) use(h, c, channel_terms(mean[h], var[h], target_mean[h], target_var[h], options));
  }
}

// The distance, in every thread of the block; writes the gradient.
template <typename A>
BNFUSE_DEVICE double distance_and_gradient(const SiteArguments<A>& site, const LossOptions& options, double* scratch) {
  double mean_sum = 0, var_sum = 0;
  double mean_slope[CHANNELS_HELD], var_slope[CHANNELS_HELD];
  const int64_t stride = CHANNELS_HELD * int64_t(blockDim.x);
  for (int64_t first = threadIdx.x; first < site.channels; first += stride)
    for_channels(site, first, options, [&](int h, int64_t, const ChannelTerms& terms) {
      mean_sum += terms.mean.value;
      var_sum += terms.var.value;
      mean_slope[h] = terms.mean.slope;
      var_slope[h] = terms.var.slope;
    });
  add_up_block(mean_sum, var_sum, scratch);
  const SiteDistance total = site_distance(mean_sum, var_sum, site.channels, options);
  const auto write = [&](int64_t channel, double of_mean, double of_var) {
    site.dmean[channel] = A(site.weight * total.mean_factor * of_mean);
    site.dvar[channel] = A(site.weight * total.var_factor * of_var);
  };
  if (site.channels <= stride) {
#pragma unroll
    for (int h = 0; h < CHANNELS_HELD; ++h) {
      const int64_t c = threadIdx.x + h * int64_t(blockDim.x);
      if (c < site.channels) write(c, mean_slope[h], var_slope[h]);
    }
  } else {
    for (int64_t first = threadIdx.x; first < site.channels; first += stride)
      for_channels(site, first, options, [&](int, int64_t channel, const ChannelTerms& terms) {
        write(channel, terms.mean.slope, terms.var.slope);
      });
  }
  return total.distance;
}

// The targets' row for a group, or −1 for a class that the table does not hold.
BNFUSE_DEVICE int64_t target_row(const int64_t* classes, int64_t table_rows, int64_t group) {
  const int64_t row = classes ? classes[group] : 0;
  return row >= 0 && row < table_rows ? row : -1;
}

// Asks for what finish_loss will read of a channel's targets.
template <typename A>
BNFUSE_DEVICE void prefetch_targets(const Finish& f, int64_t group, int64_t channel) {
  const int64_t row = target_row(f.classes, f.table_rows, group);
  if (row < 0) return;
  prefetch(static_cast<const A*>(f.target_mean) + row * f.walk.channels + channel);
  prefetch(static_cast<const A*>(f.target_var) + row * f.walk.channels + channel);
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
  if (f.walk.groups == 1) {
    if (threadIdx.x == 0) *static_cast<A*>(f.loss) = A(f.weight * distance);
    return;
  }
  if (threadIdx.x == 0) f.distances[group] = distance;
  if (!is_last_block(f.counters, f.walk.groups, flag)) return;
  double sum = 0, unused = 0;
  for (int32_t g = threadIdx.x; g < f.walk.groups; g += blockDim.x)
    sum += load_shared_by_blocks(f.distances + g);
  add_up_block(sum, unused, scratch);
  if (threadIdx.x == 0) *static_cast<A*>(f.loss) = A(f.weight / f.walk.groups * sum);
}

constexpr int64_t LOSS_SHARED_BYTES = 64 * sizeof(double) + sizeof(double);

}  // namespace
}  // namespace bnfuse
