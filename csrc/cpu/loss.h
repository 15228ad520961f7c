// The loss between moments and their targets, as bn_loss and a site with targets of its own need it. The contract is that of
// bn_loss in bnfuse/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace bnfuse {

enum class Distance { l2, l2_squared, mse, l1, kl, hinge };  // in the order of reference.DISTANCES

Distance parse_distance(const std::string& distance);

struct LossOptions {
  Distance distance;
  bool use_std;
  double eps, slack, mean_weight, var_weight;
};

// One site: mean, var [G, C], targets [K, C], classes int64 [G] or none where K = 1 → loss = weight · mean over groups of the
// distance, a scalar, and its derivatives by mean and var [G, C], all in the moments' dtype.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> site_loss(
    const torch::stable::Tensor& mean, const torch::stable::Tensor& var, const torch::stable::Tensor& target_mean,
    const torch::stable::Tensor& target_var, const std::optional<torch::stable::Tensor>& classes, double weight,
    const LossOptions& options);

}  // namespace bnfuse
