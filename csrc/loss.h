// The loss's arithmetic, channel by channel, and its options: shared by the CPU and the CUDA operators. The contract is that
// of bn_distance and bn_loss in bnfuse/reference.py; everything is computed in float64, for it is little.
#pragma once

#include <math.h>

#include <cstdint>

#include "bn_math.h"

namespace bnfuse {

enum class Distance : int32_t { l2, l2_squared, mse, l1, kl, hinge };  // in the order of reference.DISTANCES

struct LossOptions {
  Distance distance;
  bool use_std;
  double eps, slack, mean_weight, var_weight;
};

namespace {

BNFUSE_INLINE double sign(double d) { return d > 0 ? 1 : d < 0 ? -1 : d; }  // NaN stays

// What a channel adds to a sum, and the derivative of that by what stands in the channel.
struct ChannelTerm {
  double value, slope;
};

BNFUSE_INLINE ChannelTerm delta_term(double delta, const LossOptions& options) {
  const double magnitude = fabs(delta);
  if (options.distance == Distance::l1) return {magnitude, sign(delta)};
  if (options.distance == Distance::hinge) {
    const double above = magnitude - options.slack;
    const double excess = above < 0 ? 0 : above;  // NaN stays
    return {excess * excess, 2 * excess * sign(delta)};
  }
  return {delta * delta, 2 * delta};
}

// Of the channel's mean and of its variance. KL has one sum, the first.
struct ChannelTerms {
  ChannelTerm mean, var;
};

BNFUSE_INLINE ChannelTerms channel_terms(double mean, double var, double target_mean, double target_var,
                                         const LossOptions& options) {
  if (options.distance == Distance::kl) {
    const double v = var + options.eps, t = target_var + options.eps, d = mean - target_mean;
    return {{0.5 * (log(t / v) + (v + d * d) / t - 1), d / t}, {0, 0.5 * (1 / t - 1 / v)}};
  }
  const ChannelTerm mean_term = delta_term(mean - target_mean, options);
  if (!options.use_std) return {mean_term, delta_term(var - target_var, options)};
  const double deviation = sqrt(var + options.eps);
  ChannelTerm var_term = delta_term(deviation - sqrt(target_var + options.eps), options);
  var_term.slope *= 0.5 / deviation;
  return {mean_term, var_term};
}

// What becomes of a sum over the channels: its share of the distance, and the factor of the channels' slopes.
struct SiteTerm {
  double distance, factor;
};

BNFUSE_INLINE SiteTerm weighted_term(double sum, double weight, int64_t channels, Distance distance) {
  if (distance == Distance::l2) {
    const double norm = sqrt(sum);
    return {weight * norm, sum == 0 ? 0 : weight / (2 * norm)};
  }
  const double share = distance == Distance::mse || distance == Distance::l1 ? weight / channels : weight;
  return {share * sum, share};
}

struct SiteDistance {
  double distance, mean_factor, var_factor;
};

BNFUSE_INLINE SiteDistance site_distance(double mean_sum, double var_sum, int64_t channels, const LossOptions& options) {
  if (options.distance == Distance::kl) return {mean_sum / channels, 1.0 / channels, 1.0 / channels};
  const SiteTerm mean = weighted_term(mean_sum, options.mean_weight, channels, options.distance);
  const SiteTerm var = weighted_term(var_sum, options.var_weight, channels, options.distance);
  return {mean.distance + var.distance, mean.factor, var.factor};
}

}  // namespace
}  // namespace bnfuse
