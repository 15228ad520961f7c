// The operators of bnfuse_cpp on CUDA devices: what comes in is checked once, memory is allocated, kernels are launched on the
// current stream. The contract of each operator is that of the function of the same name in bnfuse/reference.py.
//
// Nothing waits for the device and everything is allocated by torch, so all of it can be captured in a CUDA graph. What stands
// in device memory is never looked at from here: group_starts and classes are checked for shape alone, and the kernels read
// nothing outside of x for whatever is in them.
//
// Only LibTorch's stable ABI is used, so one build runs under any later torch.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "../loss_input.h"
#include "backward.h"
#include "device.h"
#include "forward.h"
#include "loss.h"

namespace bnfuse {
namespace {

constexpr uintptr_t ALIGNMENT = 16;  // bytes, of the widest access
constexpr int64_t MOST_PLANE = int64_t(1) << 30;  // elements: a thread counts what is left of its plane in 32 bits

const void* read(const OptionalTensor& tensor) { return tensor ? bnfuse::read(*tensor) : nullptr; }

const int64_t* read_integers(const Tensor& tensor) { return static_cast<const int64_t*>(bnfuse::read(tensor)); }

double* doubles(const Tensor& tensor) { return static_cast<double*>(written(tensor)); }

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % ALIGNMENT == 0; }

// `tensor`, copied if it starts within a vector. How wide accesses are decides which thread holds which element, and with it in
// which order they are added up: the same values must give the same moments wherever they lie.
Tensor aligned(const Tensor& tensor) {
  return is_aligned(tensor.const_data_ptr()) ? tensor : torch::stable::clone(tensor);
}

// How x is walked by a kernel that reads and writes these tensors, all like x; null ones are none. `lean`: see places_of.
Walk walk_over(const Input& input, const Device& device, const Tensor& group_starts, bool lean,
               std::initializer_list<const void*> tensors) {
  STD_TORCH_CHECK(input.plane_size <= MOST_PLANE, "x has planes of ", input.plane_size, " elements, more than ", MOST_PLANE);
  const bool aligned = input.dtype != DType::float64 && std::all_of(tensors.begin(), tensors.end(), is_aligned);
  const Walk walk = make_walk(input.samples, input.channels, input.plane_size, input.planes, group_starts.numel() - 1, aligned,
                              input.dtype == DType::float64, lean, device.multiprocessors);
  STD_TORCH_CHECK(walk.blocks() <= std::numeric_limits<int32_t>::max(), "x is cut into ", walk.blocks(),
                  " blocks, more than a CUDA grid holds; use fewer groups");
  return walk;
}

// ---- forward ----

// Runs the forward pass described by `f`, whose act, slope, residual, scale, shift, y and mask are set, and by `finish`, whose
// targets are set where there are any. Returns mean, var [G, C].
std::tuple<Tensor, Tensor> run_forward(ForwardPass f, Finish finish, const Input& input, const Device& device, const Tensor& x,
                                       const Tensor& group_starts) {
  const int64_t groups = group_starts.numel() - 1;
  const ScalarType dtype = moment_dtype(x);
  Tensor mean = torch::stable::new_empty(x, {groups, input.channels}, dtype);
  Tensor var = torch::stable::new_empty(x, {groups, input.channels}, dtype);
  f.x = read(x);
  f.group_starts = read_integers(group_starts);
  const bool lean = forward_is_lean(kind_of(f.act), f.residual, input.planes);
  f.walk = walk_over(input, device, group_starts, lean, {f.x, f.residual, f.y});
  f.counters = finish.counters;
  const Tensor partials = torch::stable::new_empty(x, {2 * f.walk.partials()}, dtype);
  f.partials = written(partials);
  finish.walk = f.walk;
  finish.partials = f.partials;
  finish.group_starts = f.group_starts;
  finish.mean = written(mean);
  finish.var = written(var);
  finish.team = 1;
  const int64_t partials_a_group = (f.walk.chunks + groups - 1) / groups * f.walk.parts;
  while (finish.team < 32 && finish.team < partials_a_group) finish.team *= 2;
  forward_on_cuda(input.dtype, f, finish, device.stream);
  return {mean, var};
}

// Of an x without elements.
std::tuple<Tensor, Tensor> no_moments(const Input& input, const Tensor& x, const Tensor& group_starts) {
  const int64_t groups = group_starts.numel() - 1;
  return {torch::stable::new_zeros(x, {groups, input.channels}, moment_dtype(x)),
          torch::stable::new_zeros(x, {groups, input.channels}, moment_dtype(x))};
}

// Checked arguments of bn_forward, x and residual aligned, and its outputs y and mask.
struct Site {
  Input input;
  Tensor x;
  OptionalTensor residual;
  Tensor starts, scale, shift, y, mask;
  ForwardPass forward;
};

Site prepare_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& scale, const Tensor& shift,
                     const Tensor& group_starts, const std::string& act, double slope) {
  const Input input = check_x(x);
  const Tensor starts = check_group_starts_shape(group_starts, x);
  const Tensor scale_c = check_statistics("scale", scale, x, {input.channels});
  const Tensor shift_c = check_statistics("shift", shift, x, {input.channels});
  ForwardPass f{};
  f.act = parse_act(act);
  f.slope = slope;
  check_like_x("residual", residual, x);
  const OptionalTensor residual_c = residual ? OptionalTensor(aligned(*residual)) : std::nullopt;
  f.residual = read(residual_c);
  f.scale = read(scale_c);
  f.shift = read(shift_c);
  const Tensor y = torch::stable::empty_like(x);
  f.y = written(y);
  const bool needs_mask = residual && is_two_slope(f.act);
  const Tensor mask = empty_mask(x, input, needs_mask);
  f.mask = needs_mask ? static_cast<uint8_t*>(written(mask)) : nullptr;
  return {input, aligned(x), residual_c, starts, scale_c, shift_c, y, mask, f};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& scale,
                                                      const Tensor& shift, const Tensor& group_starts,
                                                      const std::string& act, double slope) {
  const Device device(x);
  const Site site = prepare_forward(x, residual, scale, shift, group_starts, act, slope);
  const auto [mean, var] = x.numel() ? run_forward(site.forward, Finish{}, site.input, device, site.x, site.starts)
                                     : no_moments(site.input, x, site.starts);
  return {site.y, mean, var, site.mask};
}

// x is cut for this kernel's registers, as for those of bn_forward with each activation and residual (`lean`): the moments of
// group_moments and bn_forward, and of bn_forward with another activation, may differ in their last bits. Each call by itself
// gives the same bits every time.
std::tuple<Tensor, Tensor> group_moments(const Tensor& x, const Tensor& group_starts) {
  const Device device(x);
  const Input input = check_x(x);
  const Tensor starts = check_group_starts_shape(group_starts, x);
  return x.numel() ? run_forward(ForwardPass{}, Finish{}, input, device, aligned(x), starts) : no_moments(input, x, starts);
}

// bn_forward, and the loss of this one site: weight · the mean over groups of the distance, with its gradients by mean and
// var.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_forward_with_targets(
    const Tensor& x, const OptionalTensor& residual, const Tensor& scale, const Tensor& shift, const Tensor& group_starts,
    const Tensor& target_mean, const Tensor& target_var, const OptionalTensor& classes, double weight,
    const std::string& act, double slope, const std::string& distance, bool use_std, double eps, double slack,
    double mean_weight, double var_weight) {
  const Device device(x);
  const Site site = prepare_forward(x, residual, scale, shift, group_starts, act, slope);
  const LossOptions options{parse_distance(distance), use_std, eps, slack, mean_weight, var_weight};
  const int64_t groups = site.starts.numel() - 1, channels = site.input.channels;
  const ScalarType dtype = moment_dtype(x);
  const Targets targets = check_targets(target_mean, target_var, classes, x, dtype, groups, channels);
  const Tensor loss = torch::stable::new_empty(x, {}, dtype);
  const Tensor dmean = torch::stable::new_empty(x, {groups, channels}, dtype);
  const Tensor dvar = torch::stable::new_empty(x, {groups, channels}, dtype);
  const auto classes_read = static_cast<const int64_t*>(read(targets.classes));
  if (!x.numel()) {
    const auto [mean, var] = no_moments(site.input, x, site.starts);
    const Tensor distances = torch::stable::new_empty(x, {groups, 1}, dtype);
    const Tensor exact_distances = torch::stable::new_empty(x, {groups, 1}, ScalarType::Double);
    const Loss site_loss{options, groups, 1, channels, read(targets.mean), read(targets.var), classes_read, targets.rows,
                         nullptr, weight, written(loss), written(distances), doubles(exact_distances), written(dmean),
                         written(dvar), 0, {}};
    loss_on_cuda(dtype == ScalarType::Double, site_loss, {{read(mean), read(var), channels, 0}}, device.stream);
    return {site.y, mean, var, site.mask, loss, dmean, dvar};
  }
  const Tensor counters = torch::stable::new_empty(x, {groups + 1}, ScalarType::Int);
  const Tensor distances = torch::stable::new_empty(x, {groups}, ScalarType::Double);
  Finish finish{};
  finish.counters = static_cast<int32_t*>(written(counters));
  finish.target_mean = read(targets.mean);
  finish.target_var = read(targets.var);
  finish.classes = classes_read;
  finish.table_rows = targets.rows;
  finish.weight = weight;
  finish.options = options;
  finish.distances = doubles(distances);
  finish.loss = written(loss);
  finish.dmean = written(dmean);
  finish.dvar = written(dvar);
  const auto [mean, var] = run_forward(site.forward, finish, site.input, device, site.x, site.starts);
  return {site.y, mean, var, site.mask, loss, dmean, dvar};
}

// ---- backward ----

// Runs the backward pass described by `f`, whose act, slope, dy, residual, mask, scale, shift, dx and dresidual are set.
void run_backward(BackwardPass f, const Input& input, const Device& device, const Tensor& x, const Tensor& mean,
                  const OptionalTensor& dmean, const OptionalTensor& dvar, const Tensor& group_starts) {
  const Tensor starts = check_group_starts_shape(group_starts, x);
  const std::vector<int64_t> shape{starts.numel() - 1, input.channels};
  const Tensor mean_c = check_statistics("mean", mean, x, shape);
  const OptionalTensor dmean_c = check_statistics("dmean", dmean, x, shape);
  const OptionalTensor dvar_c = check_statistics("dvar", dvar, x, shape);
  if (!x.numel()) return;
  f.x = read(x);
  f.mean = read(mean_c);
  f.dmean = read(dmean_c);
  f.dvar = read(dvar_c);
  f.group_starts = read_integers(starts);
  const bool lean = backward_is_lean(derivative_of(f));
  f.walk = walk_over(input, device, starts, lean, {f.dy, f.x, f.residual, f.dx, f.dresidual});
  backward_on_cuda(input.dtype, f, device.stream);
}

// bn_backward, dx written to `dx`, which may be dy; returns dresidual, or an empty tensor.
Tensor run_bn_backward(const OptionalTensor& dy, const Tensor& x, const OptionalTensor& residual, const Tensor& mask,
                       const Tensor& scale, const Tensor& shift, const Tensor& mean, const OptionalTensor& dmean,
                       const OptionalTensor& dvar, const Tensor& group_starts, const std::string& act, double slope,
                       bool want_dresidual, const Input& input, const Device& device, const Tensor& dx) {
  const Tensor scale_c = check_statistics("scale", scale, x, {input.channels});
  const Tensor shift_c = check_statistics("shift", shift, x, {input.channels});
  BackwardPass f{};
  f.act = parse_act(act);
  f.slope = slope;
  check_like_x("dy", dy, x);
  check_like_x("residual", residual, x);
  f.dy = read(dy);
  f.residual = read(residual);
  f.scale = read(scale_c);
  f.shift = read(shift_c);
  if (check_mask(mask, x, input)) f.mask = static_cast<const uint8_t*>(bnfuse::read(mask));
  f.dx = written(dx);
  const Tensor dresidual = want_dresidual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  f.dresidual = want_dresidual ? written(dresidual) : nullptr;
  run_backward(f, input, device, x, mean, dmean, dvar, group_starts);
  return dresidual;
}

std::tuple<Tensor, Tensor> bn_backward(const OptionalTensor& dy, const Tensor& x, const OptionalTensor& residual,
                                       const Tensor& mask, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                       const OptionalTensor& dmean, const OptionalTensor& dvar,
                                       const Tensor& group_starts, const std::string& act, double slope,
                                       bool want_dresidual) {
  const Device device(x);
  const Input input = check_x(x);
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor dresidual = run_bn_backward(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope,
                                           want_dresidual, input, device, dx);
  return {dx, dresidual};
}

// dx takes dy's place.
Tensor bn_backward_(const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const Tensor& mask,
                    const Tensor& scale, const Tensor& shift, const Tensor& mean, const OptionalTensor& dmean,
                    const OptionalTensor& dvar, const Tensor& group_starts, const std::string& act, double slope,
                    bool want_dresidual) {
  const Device device(x);
  const Input input = check_x(x);
  check_like_x("dy", dy, x);
  return run_bn_backward(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual,
                         input, device, dy);
}

Tensor group_moments_backward(const Tensor& x, const Tensor& mean, const OptionalTensor& dmean, const OptionalTensor& dvar,
                              const Tensor& group_starts) {
  const Device device(x);
  const Input input = check_x(x);
  const Tensor dx = torch::stable::empty_like(x);
  BackwardPass f{};
  f.dx = written(dx);
  run_backward(f, input, device, x, mean, dmean, dvar, group_starts);
  return dx;
}

// ---- loss ----

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_loss(const std::vector<Tensor>& mean, const std::vector<Tensor>& var,
                                                   const Tensor& target_mean, const Tensor& target_var,
                                                   const OptionalTensor& classes, const Tensor& site_weights,
                                                   const std::string& distance, bool use_std, double eps, double slack,
                                                   double mean_weight, double var_weight) {
  const LossOptions options{parse_distance(distance), use_std, eps, slack, mean_weight, var_weight};
  const LossInput input = check_loss(mean, var, target_mean, target_var, classes, site_weights);
  const Device device(mean[0]);
  const Tensor loss = torch::stable::new_empty(mean[0], {});
  const Tensor distances = torch::stable::new_empty(mean[0], {input.groups, input.sites});
  const Tensor exact_distances = torch::stable::new_empty(mean[0], {input.groups, input.sites}, ScalarType::Double);
  const Tensor dmean = torch::stable::new_empty(mean[0], {input.groups * input.width});
  const Tensor dvar = torch::stable::new_empty(mean[0], {input.groups * input.width});
  std::vector<LossSite> sites;
  int64_t column = 0;
  for (int64_t s = 0; s < input.sites; ++s) {
    const int64_t channels = input.mean[s].size(1);
    sites.push_back({bnfuse::read(input.mean[s]), bnfuse::read(input.var[s]), channels, column});
    column += channels;
  }
  const Loss f{options, input.groups, input.sites, input.width, bnfuse::read(input.targets.mean),
               bnfuse::read(input.targets.var), static_cast<const int64_t*>(read(input.targets.classes)), input.targets.rows,
               bnfuse::read(input.site_weights), 0, written(loss), written(distances), doubles(exact_distances),
               written(dmean), written(dvar), 0, {}};
  loss_on_cuda(input.dtype == ScalarType::Double, f, sites, device.stream);
  return {loss, distances, dmean, dvar};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("bn_forward", TORCH_BOX(&bn_forward));
  m.impl("bn_forward_with_targets", TORCH_BOX(&bn_forward_with_targets));
  m.impl("bn_backward", TORCH_BOX(&bn_backward));
  m.impl("bn_backward_", TORCH_BOX(&bn_backward_));
  m.impl("group_moments", TORCH_BOX(&group_moments));
  m.impl("group_moments_backward", TORCH_BOX(&group_moments_backward));
  m.impl("bn_loss", TORCH_BOX(&bn_loss));
}

}  // namespace
}  // namespace bnfuse

#ifndef BNFUSE_EMULATED
STABLE_TORCH_LIBRARY_IMPL(bnfuse_cpp, CUDA, m) { bnfuse::implement(m); }
#endif
