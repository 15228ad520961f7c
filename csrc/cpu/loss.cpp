// The loss over all sites at once: distances between moments and targets, their weighted sum, and its gradient. The
// contract is that of bn_loss in bnfuse/reference.py.
#include "loss.h"

#include "pool.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace bnfuse {
namespace {

// One group's distance at one site, and its derivatives by mean and var [C].
template <typename A>
double distance_and_slopes(const A* mean, const A* var, const A* target_mean, const A* target_var, int64_t channels,
                           const LossOptions& options, std::vector<double>& dmean, std::vector<double>& dvar) {
  dmean.resize(channels);
  dvar.resize(channels);
  double mean_sum = 0, var_sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const ChannelTerms terms = channel_terms(mean[c], var[c], target_mean[c], target_var[c], options);
    mean_sum += terms.mean.value;
    var_sum += terms.var.value;
    dmean[c] = terms.mean.slope;
    dvar[c] = terms.var.slope;
  }
  const SiteDistance site = site_distance(mean_sum, var_sum, channels, options);
  for (int64_t c = 0; c < channels; ++c) {
    dmean[c] *= site.mean_factor;
    dvar[c] *= site.var_factor;
  }
  return site.distance;
}

template <typename A>
void run(const LossInput& input, const std::vector<int64_t>& rows, const std::vector<double>& site_weights,
         const LossOptions& options, Tensor& loss, Tensor& distances, Tensor& dmean, Tensor& dvar) {
  const A* target_mean = input.targets.mean.const_data_ptr<A>();
  const A* target_var = input.targets.var.const_data_ptr<A>();
  A* distances_out = distances.mutable_data_ptr<A>();
  A* dmean_out = dmean.mutable_data_ptr<A>();
  A* dvar_out = dvar.mutable_data_ptr<A>();
  std::vector<double> mean_slopes, var_slopes;
  double total = 0;
  int64_t column = 0;
  for (int64_t s = 0; s < input.sites; ++s) {
    const int64_t channels = input.mean[s].size(1);
    for (int64_t g = 0; g < input.groups; ++g) {
      const int64_t target = rows[g] * input.targets.width + column;
      const double distance = distance_and_slopes(
          input.mean[s].const_data_ptr<A>() + g * channels, input.var[s].const_data_ptr<A>() + g * channels,
          target_mean + target, target_var + target, channels, options, mean_slopes, var_slopes);
      const double weight = site_weights[s] / input.groups;
      total += weight * distance;
      distances_out[g * input.sites + s] = static_cast<A>(distance);
      for (int64_t c = 0; c < channels; ++c) {
        *dmean_out++ = static_cast<A>(weight * mean_slopes[c]);
        *dvar_out++ = static_cast<A>(weight * var_slopes[c]);
      }
    }
    column += channels;
  }
  *loss.mutable_data_ptr<A>() = static_cast<A>(total);
}

// The row of the targets' table for each group.
std::vector<int64_t> target_rows(const Targets& targets, int64_t groups) {
  if (!targets.classes) return std::vector<int64_t>(groups, 0);
  const int64_t* first = targets.classes->const_data_ptr<int64_t>();
  const std::vector<int64_t> rows(first, first + groups);
  for (const int64_t row : rows)
    STD_TORCH_CHECK(row >= 0 && row < targets.rows, "classes must be from 0 to ", targets.rows - 1, ", got ", row);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_loss(const std::vector<Tensor>& mean, const std::vector<Tensor>& var,
                                                   const Tensor& target_mean, const Tensor& target_var,
                                                   const OptionalTensor& classes, const Tensor& site_weights,
                                                   const std::string& distance, bool use_std, double eps, double slack,
                                                   double mean_weight, double var_weight) {
  const LossOptions options{parse_distance(distance), use_std, eps, slack, mean_weight, var_weight};
  const LossInput input = check_loss(mean, var, target_mean, target_var, classes, site_weights);
  std::vector<double> weights(input.sites);
  for (int64_t s = 0; s < input.sites; ++s)
    weights[s] = input.dtype == ScalarType::Double ? input.site_weights.const_data_ptr<double>()[s]
                                                   : double(input.site_weights.const_data_ptr<float>()[s]);
  return loss_on_cpu(input, weights, options, {input.groups * input.width});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_on_cpu(const LossInput& input, const std::vector<double>& site_weights,
                                                       const LossOptions& options,
                                                       const std::vector<int64_t>& gradient_shape) {
  const std::vector<int64_t> rows = target_rows(input.targets, input.groups);
  Tensor loss(empty_small({}, input.dtype)), distances(empty_small({input.groups, input.sites}, input.dtype));
  Tensor dmean(empty_small(gradient_shape, input.dtype)), dvar(empty_small(gradient_shape, input.dtype));
  const auto run_dtype = input.dtype == ScalarType::Double ? run<double> : run<float>;
  run_dtype(input, rows, site_weights, options, loss, distances, dmean, dvar);
  return {loss, distances, dmean, dvar};
}

}  // namespace bnfuse

STABLE_TORCH_LIBRARY_FRAGMENT(bnfuse_cpp, m) {
  m.def(
      "bn_loss(Tensor[] mean, Tensor[] var, Tensor target_mean, Tensor target_var, Tensor? classes, Tensor site_weights, "
      "str distance, bool use_std, float eps, float slack, float mean_weight, float var_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bnfuse_cpp, CPU, m) { m.impl("bn_loss", TORCH_BOX(&bnfuse::bn_loss)); }
