// The loss over all sites at once: distances between moments and targets, their weighted sum, and its gradient. The
// contract is that of bn_loss in bnfuse/reference.py; everything is computed in float64, for it is little.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "describe.h"
#include "loss.h"
#include "pool.h"

namespace bnfuse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

double sign(double d) { return d > 0 ? 1 : d < 0 ? -1 : d; }  // NaN stays

// Adds weight·distance(delta [C]) to the result, and its derivative by delta [C] to `gradient`.
double add_term(const std::vector<double>& delta, const LossOptions& options, double weight, std::vector<double>& gradient) {
  const size_t channels = delta.size();
  const double share = options.distance == Distance::mse || options.distance == Distance::l1 ? 1.0 / channels : 1.0;
  double sum = 0;
  for (size_t c = 0; c < channels; ++c) {
    const double d = delta[c], magnitude = std::abs(d);
    switch (options.distance) {
      case Distance::l1:
        sum += magnitude;
        gradient[c] = sign(d);
        break;
      case Distance::hinge: {
        const double above = magnitude - options.slack;
        const double excess = above < 0 ? 0 : above;  // NaN stays
        sum += excess * excess;
        gradient[c] = 2 * excess * sign(d);
        break;
      }
      default:
        sum += d * d;
        gradient[c] = 2 * d;
    }
  }
  if (options.distance == Distance::l2) {
    const double norm = std::sqrt(sum);
    for (double& g : gradient) g = sum == 0 ? 0 : weight * g / (2 * norm);
    return weight * norm;
  }
  for (double& g : gradient) g *= weight * share;
  return weight * share * sum;
}

// One group's distance at one site, and its derivatives by mean and var [C].
template <typename A>
double site_distance(const A* mean, const A* var, const A* target_mean, const A* target_var, int64_t channels,
                     const LossOptions& options, std::vector<double>& dmean, std::vector<double>& dvar) {
  dmean.resize(channels);
  dvar.resize(channels);
  if (options.distance == Distance::kl) {
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double v = double(var[c]) + options.eps, t = double(target_var[c]) + options.eps;
      const double d = double(mean[c]) - double(target_mean[c]);
      sum += 0.5 * (std::log(t / v) + (v + d * d) / t - 1);
      dmean[c] = d / t / channels;
      dvar[c] = 0.5 * (1 / t - 1 / v) / channels;
    }
    return sum / channels;
  }
  std::vector<double> delta(channels);
  for (int64_t c = 0; c < channels; ++c) delta[c] = double(mean[c]) - double(target_mean[c]);
  double distance = add_term(delta, options, options.mean_weight, dmean);
  for (int64_t c = 0; c < channels; ++c)
    delta[c] = options.use_std ? std::sqrt(double(var[c]) + options.eps) - std::sqrt(double(target_var[c]) + options.eps)
                               : double(var[c]) - double(target_var[c]);
  distance += add_term(delta, options, options.var_weight, dvar);
  if (options.use_std)
    for (int64_t c = 0; c < channels; ++c) dvar[c] *= 0.5 / std::sqrt(double(var[c]) + options.eps);
  return distance;
}

// All sites; what it writes is described at bn_loss in bnfuse/ops.py.
template <typename A>
void run(const std::vector<Tensor>& mean, const std::vector<Tensor>& var, const Tensor& target_mean,
         const Tensor& target_var, const std::vector<int64_t>& rows, const std::vector<double>& weights,
         const LossOptions& options, Tensor& loss, A* distances, Tensor& dmean, Tensor& dvar) {
  const int64_t groups = mean[0].size(0), sites = static_cast<int64_t>(mean.size());
  const int64_t table_width = target_mean.size(1);
  const A *target_means = target_mean.const_data_ptr<A>(), *target_vars = target_var.const_data_ptr<A>();
  A* dmean_out = dmean.mutable_data_ptr<A>();
  A* dvar_out = dvar.mutable_data_ptr<A>();
  std::vector<double> mean_gradient, var_gradient;
  double total = 0;
  int64_t column = 0;
  for (int64_t s = 0; s < sites; ++s) {
    const int64_t channels = mean[s].size(1);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t target = rows[g] * table_width + column;
      const double distance = site_distance(mean[s].const_data_ptr<A>() + g * channels,
                                            var[s].const_data_ptr<A>() + g * channels, target_means + target,
                                            target_vars + target, channels, options, mean_gradient, var_gradient);
      const double weight = weights[s] / groups;
      total += weight * distance;
      if (distances) distances[g * sites + s] = static_cast<A>(distance);
      for (int64_t c = 0; c < channels; ++c) {
        *dmean_out++ = static_cast<A>(weight * mean_gradient[c]);
        *dvar_out++ = static_cast<A>(weight * var_gradient[c]);
      }
    }
    column += channels;
  }
  *loss.mutable_data_ptr<A>() = static_cast<A>(total);
}

Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

template <typename A>
std::vector<double> as_doubles(const Tensor& values) {
  const Tensor dense = as_contiguous(values);
  const A* first = dense.const_data_ptr<A>();
  return std::vector<double>(first, first + dense.numel());
}

void check(const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && sizes.size() == shape.size() &&
                      std::equal(shape.begin(), shape.end(), sizes.begin()),
                  name, " must be ", dtype_name(dtype), " ", list(shape), ", got ", describe(tensor));
}

std::vector<Tensor> check_moments(const char* name, const std::vector<Tensor>& moments, const std::vector<Tensor>& like) {
  STD_TORCH_CHECK(moments.size() == like.size(), name, " must have one tensor a site, ", like.size(), ", got ",
                  moments.size());
  std::vector<Tensor> dense;
  for (size_t s = 0; s < moments.size(); ++s) {
    STD_TORCH_CHECK(like[s].dim() == 2, name, " must be [G, C] at every site, got ", describe(like[s]));
    check(name, moments[s], like[0].scalar_type(), {like[0].size(0), like[s].size(1)});
    dense.push_back(as_contiguous(moments[s]));
  }
  return dense;
}

// The row of the targets' table for each group.
std::vector<int64_t> target_rows(const std::optional<Tensor>& classes, int64_t groups, int64_t table_rows) {
  if (table_rows == 1) return std::vector<int64_t>(groups, 0);
  STD_TORCH_CHECK(classes.has_value(), "a table of ", table_rows, " targets needs the class of each group, got none");
  check("classes", *classes, ScalarType::Long, {groups});
  const Tensor dense = as_contiguous(*classes);
  const int64_t* first = dense.const_data_ptr<int64_t>();
  const std::vector<int64_t> rows(first, first + groups);
  for (const int64_t row : rows)
    STD_TORCH_CHECK(row >= 0 && row < table_rows, "classes must be from 0 to ", table_rows - 1, ", got ", row);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_loss(const std::vector<Tensor>& mean, const std::vector<Tensor>& var,
                                                   const Tensor& target_mean, const Tensor& target_var,
                                                   const std::optional<Tensor>& classes, const Tensor& site_weights,
                                                   const std::string& distance, bool use_std, double eps, double slack,
                                                   double mean_weight, double var_weight) {
  const LossOptions options{parse_distance(distance), use_std, eps, slack, mean_weight, var_weight};
  STD_TORCH_CHECK(!mean.empty(), "bn_loss needs at least one site, got none");
  const ScalarType dtype = mean[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "moments must be float32 or float64, got ",
                  describe(mean[0]));
  const std::vector<Tensor> mean_c = check_moments("mean", mean, mean), var_c = check_moments("var", var, mean);
  const int64_t groups = mean[0].size(0), sites = static_cast<int64_t>(mean.size());
  int64_t width = 0;
  for (const Tensor& site : mean) width += site.size(1);
  STD_TORCH_CHECK(target_mean.dim() == 2, "target_mean must be [K, ", width, "], got ", describe(target_mean));
  check("target_mean", target_mean, dtype, {target_mean.size(0), width});
  check("target_var", target_var, dtype, {target_mean.size(0), width});
  check("site_weights", site_weights, dtype, {sites});
  const std::vector<int64_t> rows = target_rows(classes, groups, target_mean.size(0));

  Tensor loss(empty_small({}, dtype)), distances(empty_small({groups, sites}, dtype));
  Tensor dmean(empty_small({groups * width}, dtype)), dvar(empty_small({groups * width}, dtype));
  const Tensor target_mean_c = as_contiguous(target_mean), target_var_c = as_contiguous(target_var);
  if (dtype == ScalarType::Double)
    run<double>(mean_c, var_c, target_mean_c, target_var_c, rows, as_doubles<double>(site_weights), options, loss,
                distances.mutable_data_ptr<double>(), dmean, dvar);
  else
    run<float>(mean_c, var_c, target_mean_c, target_var_c, rows, as_doubles<float>(site_weights), options, loss,
               distances.mutable_data_ptr<float>(), dmean, dvar);
  return {loss, distances, dmean, dvar};
}

}  // namespace

Distance parse_distance(const std::string& distance) {
  const std::array<const char*, 6> names{"l2", "l2_squared", "mse", "l1", "kl", "hinge"};
  for (size_t i = 0; i < names.size(); ++i)
    if (distance == names[i]) return static_cast<Distance>(i);
  STD_TORCH_CHECK(false, "distance must be one of l2, l2_squared, mse, l1, kl, hinge, got '", distance, "'");
}

std::tuple<Tensor, Tensor, Tensor> site_loss(const Tensor& mean, const Tensor& var, const Tensor& target_mean,
                                             const Tensor& target_var, const std::optional<Tensor>& classes,
                                             double weight, const LossOptions& options) {
  const ScalarType dtype = mean.scalar_type();
  const int64_t groups = mean.size(0), channels = mean.size(1);
  STD_TORCH_CHECK(target_mean.dim() == 2, "target_mean must be [K, ", channels, "], got ", describe(target_mean));
  check("target_mean", target_mean, dtype, {target_mean.size(0), channels});
  check("target_var", target_var, dtype, {target_mean.size(0), channels});
  const std::vector<int64_t> rows = target_rows(classes, groups, target_mean.size(0));
  Tensor loss(empty_small({}, dtype));
  Tensor dmean(empty_small({groups, channels}, dtype)), dvar(empty_small({groups, channels}, dtype));
  const Tensor target_mean_c = as_contiguous(target_mean), target_var_c = as_contiguous(target_var);
  if (dtype == ScalarType::Double)
    run<double>({mean}, {var}, target_mean_c, target_var_c, rows, {weight}, options, loss, nullptr, dmean, dvar);
  else
    run<float>({mean}, {var}, target_mean_c, target_var_c, rows, {weight}, options, loss, nullptr, dmean, dvar);
  return {loss, dmean, dvar};
}
}  // namespace bnfuse

STABLE_TORCH_LIBRARY_FRAGMENT(bnfuse_cpp, m) {
  m.def(
      "bn_loss(Tensor[] mean, Tensor[] var, Tensor target_mean, Tensor target_var, Tensor? classes, Tensor site_weights, "
      "str distance, bool use_std, float eps, float slack, float mean_weight, float var_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bnfuse_cpp, CPU, m) { m.impl("bn_loss", TORCH_BOX(&bnfuse::bn_loss)); }
