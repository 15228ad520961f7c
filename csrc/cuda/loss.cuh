// The loss kernels: every group's distance at every site, a block each, and their sum.
#pragma once

#include "loss.h"
#include "site_loss.cuh"

namespace bnfuse {
namespace {

template <typename A>
BNFUSE_DEVICE double weight_of(const Loss& f, int64_t site) {
  return f.site_weights ? double(static_cast<const A*>(f.site_weights)[site]) : f.weight;
}

template <typename A>
__global__ void __launch_bounds__(SMALL_THREADS, 1) distances_kernel(const __grid_constant__ Loss f) {
  const int64_t group = blockIdx.x % f.groups, in_launch = blockIdx.x / f.groups, s = f.first_site + in_launch;
  const LossSite& site = f.site[in_launch];
  const int64_t row = target_row(f.classes, f.table_rows, group), target = row * f.width + site.column;
  const int64_t out = f.groups * site.column + group * site.channels;
  const SiteArguments<A> arguments{static_cast<const A*>(site.mean) + group * site.channels,
                                   static_cast<const A*>(site.var) + group * site.channels,
                                   row < 0 ? nullptr : static_cast<const A*>(f.target_mean) + target,
                                   static_cast<const A*>(f.target_var) + target,
                                   site.channels,
                                   weight_of<A>(f, s) / f.groups,
                                   static_cast<A*>(f.dmean) + out,
                                   static_cast<A*>(f.dvar) + out};
  const double distance = distance_and_gradient(arguments, f.options, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    f.exact_distances[group * f.sites + s] = distance;
    static_cast<A*>(f.distances)[group * f.sites + s] = A(distance);
  }
}

// One block.
template <typename A>
__global__ void __launch_bounds__(SMALL_THREADS) loss_kernel(const __grid_constant__ Loss f) {
  double sum = 0, unused = 0;
  for (int64_t i = threadIdx.x; i < f.groups * f.sites; i += blockDim.x)
    sum += weight_of<A>(f, i % f.sites) * f.exact_distances[i];
  add_up_block(sum, unused, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) *static_cast<A*>(f.loss) = A(sum / f.groups);
}

}  // namespace
}  // namespace bnfuse
