// What the loss operators of every device check of their arguments.
#pragma once

#include "input.h"
#include "loss.h"

namespace bnfuse {

inline Distance parse_distance(const std::string& distance) {
  const std::array<const char*, 6> names{"l2", "l2_squared", "mse", "l1", "kl", "hinge"};
  for (size_t i = 0; i < names.size(); ++i)
    if (distance == names[i]) return static_cast<Distance>(i);
  STD_TORCH_CHECK(false, "distance must be one of l2, l2_squared, mse, l1, kl, hinge, got '", distance, "'");
}

// The targets, contiguous: [K, T] in `dtype`; classes [G] only where K > 1.
struct Targets {
  Tensor mean, var;
  OptionalTensor classes;
  int64_t rows, width;  // K, T
};

inline Targets check_targets(const Tensor& target_mean, const Tensor& target_var, const OptionalTensor& classes,
                             const Tensor& like, ScalarType dtype, int64_t groups, int64_t width) {
  STD_TORCH_CHECK(target_mean.dim() == 2, "target_mean must be [K, ", width, "], got ", describe(target_mean));
  const int64_t rows = target_mean.size(0);
  check_small("target_mean", target_mean, like, dtype, {rows, width});
  check_small("target_var", target_var, like, dtype, {rows, width});
  Targets targets{made_contiguous(target_mean), made_contiguous(target_var), std::nullopt, rows, width};
  if (rows != 1) {
    STD_TORCH_CHECK(classes.has_value(), "a table of ", rows, " targets needs the class of each group, got none");
    check_small("classes", *classes, like, ScalarType::Long, {groups});
    targets.classes = made_contiguous(*classes);
  }
  return targets;
}

// The moments of all sites, contiguous, and their targets.
struct LossInput {
  std::vector<Tensor> mean, var;  // of each site [G, C]
  Targets targets;
  Tensor site_weights;            // [S], bn_loss's alone
  ScalarType dtype;
  int64_t groups, sites, width;   // G, S, T
};

inline std::vector<Tensor> check_moments(const char* name, const std::vector<Tensor>& moments,
                                         const std::vector<Tensor>& like) {
  STD_TORCH_CHECK(moments.size() == like.size(), name, " must have one tensor a site, ", like.size(), ", got ",
                  moments.size());
  std::vector<Tensor> contiguous;
  for (size_t s = 0; s < moments.size(); ++s) {
    STD_TORCH_CHECK(like[s].dim() == 2, name, " must be [G, C] at every site, got ", describe(like[s]));
    check_small(name, moments[s], like[0], like[0].scalar_type(), {like[0].size(0), like[s].size(1)});
    contiguous.push_back(made_contiguous(moments[s]));
  }
  return contiguous;
}

inline LossInput check_loss(const std::vector<Tensor>& mean, const std::vector<Tensor>& var, const Tensor& target_mean,
                            const Tensor& target_var, const OptionalTensor& classes, const Tensor& site_weights) {
  STD_TORCH_CHECK(!mean.empty(), "bn_loss needs at least one site, got none");
  const ScalarType dtype = mean[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "moments must be float32 or float64, got ",
                  describe(mean[0]));
  std::vector<Tensor> mean_c = check_moments("mean", mean, mean), var_c = check_moments("var", var, mean);
  const int64_t groups = mean[0].size(0), sites = static_cast<int64_t>(mean.size());
  int64_t width = 0;
  for (const Tensor& site : mean) width += site.size(1);
  Targets targets = check_targets(target_mean, target_var, classes, mean[0], dtype, groups, width);
  check_small("site_weights", site_weights, mean[0], dtype, {sites});
  return {std::move(mean_c), std::move(var_c), std::move(targets), made_contiguous(site_weights), dtype, groups, sites, width};
}

}  // namespace bnfuse
