// The gradients of bnfuse_cpp's operators, and nothing else: which tensors are kept, and which kernel runs backward.
// The gradients' own gradients are those of every other backend: bnfuse/ops.py registers them for bn_backward and
// group_moments_backward, which therefore are called through the dispatcher where a graph of the gradient is made.
//
// This file alone uses the full C++ API of torch, since the stable one has no autograd; in Python the same takes a
// quarter of a millisecond a site, more than the kernels of a small one.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace bnfuse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// bnfuse_cpp's operator of this name, whose C++ signature is Signature.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& bn_forward_op() {
  static const auto op = find<FourTensors(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                          const Tensor&, c10::string_view, double)>("bnfuse_cpp::bn_forward");
  return op;
}

const auto& bn_forward_with_targets_op() {
  static const auto op =
      find<SevenTensors(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const OptionalTensor&, double, c10::string_view, double, c10::string_view, bool,
                        double, double, double, double)>("bnfuse_cpp::bn_forward_with_targets");
  return op;
}

const auto& bn_backward_op() {
  static const auto op =
      find<TwoTensors(const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                      c10::string_view, double, bool)>("bnfuse_cpp::bn_backward");
  return op;
}

const auto& bn_backward_in_place_op() {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, c10::string_view, double,
                  bool)>("bnfuse_cpp::bn_backward_");
  return op;
}

const auto& group_moments_op() {
  static const auto op = find<TwoTensors(const Tensor&, const Tensor&)>("bnfuse_cpp::group_moments");
  return op;
}

const auto& group_moments_backward_op() {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                     const Tensor&)>("bnfuse_cpp::group_moments_backward");
  return op;
}

const auto& bn_loss_op() {
  static const auto op =
      find<FourTensors(at::TensorList, at::TensorList, const Tensor&, const Tensor&, const OptionalTensor&,
                       const Tensor&, c10::string_view, bool, double, double, double, double)>("bnfuse_cpp::bn_loss");
  return op;
}

// bn_loss's derivatives by mean and var, [G·T] each, as functions of them that autograd knows; defined in bnfuse/ops.py.
const auto& bn_loss_coefficients_op() {
  static const auto op =
      find<TwoTensors(at::TensorList, at::TensorList, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                      c10::string_view, bool, double, double, double, double)>("bnfuse_reference::bn_loss_coefficients");
  return op;
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Whether nobody but this backward pass will ever see what is in `gradient`, so that it may be overwritten: the test
// that torch's own accumulation of gradients makes before it takes one over.
bool is_ours_alone(const Tensor& gradient) {
  return !at::GradMode::is_enabled() && !at::isTensorSubclassLike(gradient) && gradient.use_count() == 1 &&
         gradient.storage().use_count() == 1 && !gradient.requires_grad();
}

// While it lives, and unless a graph of the gradient is to be made, operators are their kernels: nothing of theirs is
// recorded, and what bnfuse/ops.py registered for the second order is not entered.
struct FirstOrderGuard {
  FirstOrderGuard() {
    if (!at::GradMode::is_enabled()) kernels_alone.emplace();
  }
  std::optional<at::AutoDispatchBelowADInplaceOrView> kernels_alone;
};

// ---- what bn_loss and a site with targets keep of the loss's options ----

struct Options {
  std::string distance;
  bool use_std;
  double eps, slack, mean_weight, var_weight;
};

void keep_options(AutogradContext* ctx, const Options& o) {
  ctx->saved_data["distance"] = o.distance;
  ctx->saved_data["options"] = std::vector<double>{double(o.use_std), o.eps, o.slack, o.mean_weight, o.var_weight};
}

TwoTensors differentiable_coefficients(AutogradContext* ctx, at::TensorList mean, at::TensorList var,
                                       const Tensor& target_mean, const Tensor& target_var, const Tensor& classes,
                                       const Tensor& site_weights) {
  const std::vector<double> o = ctx->saved_data["options"].toDoubleVector();
  return bn_loss_coefficients_op().call(mean, var, target_mean, target_var, optional(classes), site_weights,
                                        ctx->saved_data["distance"].toStringRef(), o[0] != 0, o[1], o[2], o[3], o[4]);
}

// ---- bn_forward, and the same with targets ----

// What a site keeps for backward, in the order in which it is saved; from DMEAN on, one with targets.
enum Saved { X, RESIDUAL, SCALE, SHIFT, GROUP_STARTS, MEAN, MASK, DMEAN, DVAR, VAR, TARGET_MEAN, TARGET_VAR, CLASSES };

void check_frozen(const Tensor& scale, const Tensor& shift) {
  TORCH_CHECK(!scale.requires_grad() && !shift.requires_grad(),
              "a site gives no gradient to scale and shift; freeze the network with bnfuse.freeze(model)");
}

void check_constants(const Tensor& target_mean, const Tensor& target_var) {
  TORCH_CHECK(!target_mean.requires_grad() && !target_var.requires_grad(),
              "the loss gives no gradient to its targets, which are constants; detach them");
}

// `kept`: the tensors of Saved, as far as there are any; the residual is kept only where act' needs it.
void keep_for_backward(AutogradContext* ctx, variable_list kept, const std::string& act, double slope) {
  ctx->saved_data["act"] = act;
  ctx->saved_data["slope"] = slope;
  ctx->saved_data["has_residual"] = kept[RESIDUAL].defined();
  // With a mask the residual is not needed again; without a residual there is nothing to keep but x.
  if (act == "identity" || kept[MASK].sym_numel() != 0) kept[RESIDUAL] = Tensor();
  ctx->save_for_backward(std::move(kept));
  ctx->set_materialize_grads(false);
}

// dx and dresidual, undefined where nobody wants them. dy may be overwritten where nobody else holds it.
std::pair<Tensor, Tensor> backward_of_site(AutogradContext* ctx, const variable_list& saved, Tensor& dy,
                                           const Tensor& dmean, const Tensor& dvar) {
  const Tensor &x = saved[X], &mask = saved[MASK];
  const OptionalTensor residual = optional(saved[RESIDUAL]);
  const std::string& act = ctx->saved_data["act"].toStringRef();
  const double slope = ctx->saved_data["slope"].toDouble();
  const bool identity = act == "identity";

  if (dy.defined() && dy.sym_strides() != x.sym_strides()) dy = at::empty_like(x).copy_(dy);
  const bool wants_dresidual = ctx->saved_data["has_residual"].toBool() && ctx->needs_input_grad(1) && dy.defined();
  const bool derives_dresidual = wants_dresidual && !identity;
  Tensor dx, dresidual;
  if (ctx->needs_input_grad(0) || derives_dresidual) {
    if (dy.defined() && !(wants_dresidual && identity) && is_ours_alone(dy)) {
      dresidual = bn_backward_in_place_op().call(dy, x, residual, mask, saved[SCALE], saved[SHIFT], saved[MEAN],
                                                 optional(dmean), optional(dvar), saved[GROUP_STARTS], act, slope,
                                                 derives_dresidual);
      dx = dy;
    } else {
      const FirstOrderGuard guard;
      std::tie(dx, dresidual) = bn_backward_op().call(optional(dy), x, residual, mask, saved[SCALE], saved[SHIFT],
                                                      saved[MEAN], optional(dmean), optional(dvar), saved[GROUP_STARTS],
                                                      act, slope, derives_dresidual);
    }
  }
  if (wants_dresidual && identity) dresidual = dy;
  return {dx, wants_dresidual ? dresidual : Tensor()};
}

struct BnForward : torch::autograd::Function<BnForward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
                               const Tensor& scale, const Tensor& shift, const Tensor& group_starts,
                               const std::string& act, double slope) {
    check_frozen(scale, shift);
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, mean, var, mask] = bn_forward_op().call(x, residual, scale, shift, group_starts, act, slope);
    keep_for_backward(ctx, {x, residual.value_or(Tensor()), scale, shift, group_starts, mean, mask}, act, slope);
    ctx->mark_non_differentiable({mask});
    return {y, mean, var, mask};
  }

  // By reference, so that a gradient that nobody else holds is seen to be so.
  static variable_list backward(AutogradContext* ctx, variable_list& gradients) {
    auto [dx, dresidual] = backward_of_site(ctx, ctx->get_saved_variables(), gradients[0], gradients[1], gradients[2]);
    return {dx, dresidual, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

FourTensors bn_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& scale, const Tensor& shift,
                       const Tensor& group_starts, c10::string_view act, double slope) {
  const variable_list out = BnForward::apply(x, residual, scale, shift, group_starts, std::string(act), slope);
  return {out[0], out[1], out[2], out[3]};
}

// Whether a scalar is seen to be 1, and a constant, without waiting for a device or asking the dispatcher.
bool is_plainly_one(const Tensor& scalar) {
  if (at::GradMode::is_enabled() && scalar.requires_grad()) return false;
  if (!scalar.is_cpu() || at::isTensorSubclassLike(scalar) || scalar.is_neg() || scalar._is_zerotensor()) return false;
  if (scalar.scalar_type() == at::kFloat) return *scalar.const_data_ptr<float>() == 1;
  return scalar.scalar_type() == at::kDouble && *scalar.const_data_ptr<double>() == 1;
}

// factor·coefficients (+ gradient), where factor is a scalar tensor; any of the two terms may be absent.
Tensor scaled_sum(const Tensor& factor, const Tensor& coefficients, const Tensor& gradient) {
  if (!factor.defined()) return gradient;
  const Tensor scaled = is_plainly_one(factor) ? coefficients : coefficients * factor;  // 1: the loss is summed as it is
  return gradient.defined() ? scaled + gradient : scaled;
}

struct BnForwardWithTargets : torch::autograd::Function<BnForwardWithTargets> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
                               const Tensor& scale, const Tensor& shift, const Tensor& group_starts,
                               const Tensor& target_mean, const Tensor& target_var, const OptionalTensor& classes,
                               double weight, const std::string& act, double slope, const std::string& distance,
                               bool use_std, double eps, double slack, double mean_weight, double var_weight) {
    check_frozen(scale, shift);
    check_constants(target_mean, target_var);
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, mean, var, mask, loss, dmean, dvar] =
        bn_forward_with_targets_op().call(x, residual, scale, shift, group_starts, target_mean, target_var, classes, weight,
                                          act, slope, distance, use_std, eps, slack, mean_weight, var_weight);
    keep_for_backward(ctx,
                      {x, residual.value_or(Tensor()), scale, shift, group_starts, mean, mask, dmean, dvar, var, target_mean,
                       target_var, classes.value_or(Tensor())},
                      act, slope);
    ctx->saved_data["weight"] = weight;
    keep_options(ctx, {distance, use_std, eps, slack, mean_weight, var_weight});
    ctx->mark_non_differentiable({mask, dmean, dvar});
    return {y, mean, var, mask, loss, dmean, dvar};
  }

  static variable_list backward(AutogradContext* ctx, variable_list& gradients) {
    variable_list saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled() && gradients[4].defined()) {
      const Tensor weight = at::full({1}, ctx->saved_data["weight"].toDouble(), saved[MEAN].options());
      std::tie(saved[DMEAN], saved[DVAR]) = differentiable_coefficients(
          ctx, {saved[MEAN]}, {saved[VAR]}, saved[TARGET_MEAN], saved[TARGET_VAR], saved[CLASSES], weight);
      for (const Saved coefficients : {DMEAN, DVAR}) saved[coefficients] = saved[coefficients].view_as(saved[MEAN]);
    }
    Tensor dmean, dvar;
    const bool loss_alone = gradients[4].defined() && !gradients[1].defined() && !gradients[2].defined();
    if (loss_alone && gradients[4].is_cuda() && !at::GradMode::is_enabled()) {
      std::vector<Tensor> scaled = at::_foreach_mul({saved[DMEAN], saved[DVAR]}, gradients[4]);  // one launch
      dmean = std::move(scaled[0]);
      dvar = std::move(scaled[1]);
    } else {
      dmean = scaled_sum(gradients[4], saved[DMEAN], gradients[1]);
      dvar = scaled_sum(gradients[4], saved[DVAR], gradients[2]);
    }
    auto [dx, dresidual] = backward_of_site(ctx, saved, gradients[0], dmean, dvar);
    variable_list result{dx, dresidual};
    result.resize(17);
    return result;
  }
};

SevenTensors bn_forward_with_targets(const Tensor& x, const OptionalTensor& residual, const Tensor& scale,
                                     const Tensor& shift, const Tensor& group_starts, const Tensor& target_mean,
                                     const Tensor& target_var, const OptionalTensor& classes, double weight,
                                     c10::string_view act, double slope, c10::string_view distance, bool use_std,
                                     double eps, double slack, double mean_weight, double var_weight) {
  const variable_list out = BnForwardWithTargets::apply(
      x, residual, scale, shift, group_starts, target_mean, target_var, classes, weight, std::string(act), slope,
      std::string(distance), use_std, eps, slack, mean_weight, var_weight);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

// ---- group_moments ----

struct GroupMoments : torch::autograd::Function<GroupMoments> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& group_starts) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [mean, var] = group_moments_op().call(x, group_starts);
    ctx->save_for_backward({x, group_starts, mean});
    ctx->set_materialize_grads(false);
    return {mean, var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const FirstOrderGuard guard;
    return {group_moments_backward_op().call(saved[0], saved[2], optional(gradients[0]), optional(gradients[1]), saved[1]),
            Tensor()};
  }
};

TwoTensors group_moments(const Tensor& x, const Tensor& group_starts) {
  const variable_list out = GroupMoments::apply(x, group_starts);
  return {out[0], out[1]};
}

// ---- bn_loss: the coefficients are ready, backward scales them ----

struct BnLoss : torch::autograd::Function<BnLoss> {
  static variable_list forward(AutogradContext* ctx, at::TensorList mean, at::TensorList var, const Tensor& target_mean,
                               const Tensor& target_var, const OptionalTensor& classes, const Tensor& site_weights,
                               const std::string& distance, bool use_std, double eps, double slack, double mean_weight,
                               double var_weight) {
    check_constants(target_mean, target_var);
    TORCH_CHECK(!site_weights.requires_grad(), "bn_loss gives no gradient to site_weights, which are constants; detach them");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, distances, dmean, dvar] = bn_loss_op().call(mean, var, target_mean, target_var, classes, site_weights,
                                                            distance, use_std, eps, slack, mean_weight, var_weight);
    variable_list kept{dmean, dvar, target_mean, target_var, classes.value_or(Tensor()), site_weights};
    kept.insert(kept.end(), mean.begin(), mean.end());
    kept.insert(kept.end(), var.begin(), var.end());
    ctx->save_for_backward(std::move(kept));
    keep_options(ctx, {distance, use_std, eps, slack, mean_weight, var_weight});
    std::vector<int64_t> channels;
    for (const Tensor& site : mean) channels.push_back(site.size(1));
    ctx->saved_data["channels"] = channels;
    ctx->saved_data["groups"] = mean[0].size(0);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({distances, dmean, dvar});
    return {loss, distances, dmean, dvar};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> channels = ctx->saved_data["channels"].toIntVector();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    TwoTensors both{saved[0], saved[1]};
    if (at::GradMode::is_enabled() && gradients[0].defined()) {
      const at::TensorList moments = at::TensorList(saved).slice(6);
      both = differentiable_coefficients(ctx, moments.slice(0, channels.size()), moments.slice(channels.size()), saved[2],
                                         saved[3], saved[4], saved[5]);
    }
    variable_list result;
    for (const Tensor& coefficients : {std::get<0>(both), std::get<1>(both)}) {
      const Tensor scaled = gradients[0].defined() ? coefficients * gradients[0] : Tensor();
      int64_t at = 0;
      for (const int64_t c : channels) {
        result.push_back(scaled.defined() ? scaled.narrow(0, at, groups * c).view({groups, c}) : Tensor());
        at += groups * c;
      }
    }
    result.resize(result.size() + 10);  // the targets, classes, weights and options
    return result;
  }
};

FourTensors bn_loss(at::TensorList mean, at::TensorList var, const Tensor& target_mean, const Tensor& target_var,
                    const OptionalTensor& classes, const Tensor& site_weights, c10::string_view distance, bool use_std,
                    double eps, double slack, double mean_weight, double var_weight) {
  const variable_list out = BnLoss::apply(mean, var, target_mean, target_var, classes, site_weights,
                                          std::string(distance), use_std, eps, slack, mean_weight, var_weight);
  return {out[0], out[1], out[2], out[3]};
}

// ---- frozen_convolution: as torch's, but for what it keeps ----
//
// The gradient of a convolution's input needs the weight and the input's shape; its values are for the weight's gradient
// alone, which a frozen network never asks for. torch keeps them all the same. Here they are not kept, and what is left for
// backward of a BatchNorm, its activation and the convolution after it is one tensor instead of two.

// The weight, laid out so that torch takes `format` for the whole convolution: it asks input and weight, and either's
// channels_last decides. A 1×1 kernel is in both formats at once, and is then taken to be in neither unless strides say so.
Tensor in_format(const Tensor& weight, at::MemoryFormat format) {
  if (format == at::MemoryFormat::Contiguous || weight.suggest_memory_format() == format) return weight;
  return weight.contiguous(format).as_strided(weight.sizes(), format == at::MemoryFormat::ChannelsLast
                                                                  ? c10::get_channels_last_strides_2d(weight.sizes())
                                                                  : c10::get_channels_last_strides_3d(weight.sizes()));
}

struct FrozenConvolution : torch::autograd::Function<FrozenConvolution> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups) {
    TORCH_CHECK(!weight.requires_grad() && !(bias && bias->requires_grad()),
                "frozen_convolution gives no gradient to weight and bias; freeze the network with bnfuse.freeze(model)");
    ctx->save_for_backward({weight});
    ctx->saved_data["sizes"] = x.sizes().vec();
    ctx->saved_data["strides"] = x.strides().vec();
    ctx->saved_data["format"] = static_cast<int64_t>(x.suggest_memory_format());
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    const at::AutoDispatchBelowADInplaceOrView guard;
    return at::convolution(x, weight, bias, stride, padding, dilation, false, std::vector<int64_t>(stride.size()), groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    auto& data = ctx->saved_data;
    const std::vector<int64_t> stride = data["stride"].toIntVector(), sizes = data["sizes"].toIntVector();
    // The input's place is taken by a tensor of its shape, from which nothing is read.
    Tensor weight = ctx->get_saved_variables()[0], x;
    if (weight.is_cpu()) {  // memory that nobody touches costs nothing, and some convolutions copy what is not dense
      x = at::empty_strided(sizes, data["strides"].toIntVector(), weight.options());
    } else {  // one element, expanded; what its strides cannot say of the layout, the weight's do
      const auto format = static_cast<at::MemoryFormat>(data["format"].toInt());
      weight = in_format(weight, format);
      x = weight.suggest_memory_format() == format
              ? at::empty({}, weight.options()).expand(sizes)
              : at::empty_strided(sizes, data["strides"].toIntVector(), weight.options());  // [O, 1, 1, 1] has no format
    }
    const auto [dx, _weight, _bias] = at::convolution_backward(
        gradients[0], x, weight, std::nullopt, stride, data["padding"].toIntVector(), data["dilation"].toIntVector(), false,
        std::vector<int64_t>(stride.size()), data["groups"].toInt(), {true, false, false});
    return {dx, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor frozen_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return FrozenConvolution::apply(x, weight, bias, stride.vec(), padding.vec(), dilation.vec(), groups);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return at::convolution(x, weight, bias, stride, padding, dilation, false, std::vector<int64_t>(stride.size()), groups);
}

}  // namespace
}  // namespace bnfuse

TORCH_LIBRARY_FRAGMENT(bnfuse_cpp, m) {
  m.def(
      "frozen_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(bnfuse_cpp, Autograd, m) { m.impl("frozen_convolution", &bnfuse::frozen_convolution); }

TORCH_LIBRARY_IMPL(bnfuse_cpp, CompositeExplicitAutograd, m) { m.impl("frozen_convolution", &bnfuse::convolution); }

// The gradients are the same on every device.
static void implement_autograd(torch::Library& m) {
  m.impl("bn_forward", &bnfuse::bn_forward);
  m.impl("bn_forward_with_targets", &bnfuse::bn_forward_with_targets);
  m.impl("group_moments", &bnfuse::group_moments);
  m.impl("bn_loss", &bnfuse::bn_loss);
}

TORCH_LIBRARY_IMPL(bnfuse_cpp, AutogradCPU, m) { implement_autograd(m); }
TORCH_LIBRARY_IMPL(bnfuse_cpp, AutogradCUDA, m) { implement_autograd(m); }
