// The operators of bnfuse_cpp on the CPU: what comes in is checked once, memory is allocated, the work is cut into
// shares and the partial moments are merged. The arithmetic on elements is in kernels.inl; the contract of each
// operator is that of the function of the same name in bnfuse/reference.py.
//
// Only LibTorch's stable ABI is used, so one build runs under any later torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../input.h"
#include "kernels.h"
#include "loss.h"
#include "pool.h"

namespace bnfuse {
namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 32768;  // fewer do not pay for waking a thread
constexpr int64_t TINY_PLANE = 16;              // planes of up to as many elements are walked as columns
constexpr int64_t FOLDED_WIDTH = 256;           // narrower rows are folded until a long row has as many columns
constexpr int64_t ITEM_ELEMENTS = 65536;        // of the walk over columns, about
constexpr int64_t PLANE_ITEM_ELEMENTS = 262144; // of the walk over planes, at most
constexpr int64_t ITEMS = 16;                   // of columns, and
constexpr int64_t PLANE_ITEMS = 32;             // of planes, are enough to keep threads equally busy
constexpr int64_t FEW_ITEMS = 8;                // are too few to be worth whole rows, in memory's order

// ---- the groups, checked ----

// [G + 1], from 0 to N without decreasing.
std::vector<int64_t> check_group_starts(const Tensor& group_starts, const Tensor& x) {
  const Tensor contiguous = check_group_starts_shape(group_starts, x);
  const int64_t* first = contiguous.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(first, first + contiguous.numel());
  STD_TORCH_CHECK(starts.front() == 0 && starts.back() == x.size(0) && std::is_sorted(starts.begin(), starts.end()),
                  "group_starts must run from 0 to the batch size ", x.size(0), " without decreasing, got ",
                  list(starts));
  return starts;
}

// ---- cutting the work ----

// Calls run(begin, end) for shares of `items` which together hold `elements`.
template <typename Run>
void in_parallel(int64_t items, int64_t elements, const Run& run) {
  if (items == 0 || elements == 0) return;
  const int64_t grain = std::max<int64_t>(1, ELEMENTS_PER_THREAD * items / elements);
  torch::stable::parallel_for(0, items, grain, run);
}

// Whether x is walked as planes; otherwise as columns (see kernels.h).
bool walks_planes(const Input& input) { return input.planes && input.plane_size > TINY_PLANE; }

// [begin, end) of each group in steps of `step` rows, of which a sample has `rows_a_sample`.
std::vector<RowChunk> chunks_of(const std::vector<int64_t>& group_starts, int64_t rows_a_sample, int64_t step) {
  std::vector<RowChunk> chunks;
  for (size_t group = 0; group + 1 < group_starts.size(); ++group) {
    const int64_t end = group_starts[group + 1] * rows_a_sample;
    for (int64_t row = group_starts[group] * rows_a_sample; row < end; row += step)
      chunks.push_back({row, std::min(row + step, end), static_cast<int64_t>(group)});
  }
  return chunks;
}

// The walk over planes with its chunks, cut by shapes alone (see CutColumns).
struct CutPlanes {
  std::vector<RowChunk> chunks;
  PlaneWalk walk;
  int64_t items() const { return static_cast<int64_t>(chunks.size()) * walk.channel_tiles; }

  CutPlanes(const Input& input, const std::vector<int64_t>& group_starts) {
    const int64_t channels = std::max<int64_t>(1, input.channels);
    const int64_t sample = std::max<int64_t>(1, channels * input.plane_size);  // elements
    const int64_t item = std::clamp(group_starts.back() * sample / PLANE_ITEMS, ELEMENTS_PER_THREAD, PLANE_ITEM_ELEMENTS);
    walk.channel_tiles = std::min((sample + item - 1) / item, channels);
    walk.tile_channels = (channels + walk.channel_tiles - 1) / walk.channel_tiles;
    walk.channel_tiles = (channels + walk.tile_channels - 1) / walk.tile_channels;
    chunks = chunks_of(group_starts, 1, std::max<int64_t>(1, item / sample));
    walk.chunks = chunks.data();
  }
};

// The walk over columns with its chunks. How it is cut depends on shapes alone, so that the sums run in one order
// whatever the number of threads.
struct CutColumns {
  std::vector<RowChunk> chunks;
  ColumnWalk walk;
  int64_t items() const { return static_cast<int64_t>(chunks.size()) * walk.channel_tiles; }

  CutColumns(const Input& input, const std::vector<int64_t>& group_starts) {
    const int64_t channels = std::max<int64_t>(1, input.channels);
    const int64_t rows_a_sample = input.planes ? 1 : input.plane_size;
    walk.channels = input.channels;
    walk.run = input.planes ? input.plane_size : 1;
    walk.fold = 1;
    while (walk.fold * channels * walk.run < FOLDED_WIDTH) walk.fold *= 2;

    const int64_t rows = group_starts.back() * rows_a_sample, columns = walk.fold * channels * walk.run;
    const int64_t affordable = rows * channels * walk.run / ELEMENTS_PER_THREAD;
    int64_t width = std::min(columns, COLUMN_TILE);
    int64_t long_rows = std::clamp<int64_t>(ITEM_ELEMENTS / width, 128, 256);
    cut_channels(channels, (columns + width - 1) / width);
    // Short items rather than narrow ones, whose pieces of rows lie apart; but their coefficients must be worth their making.
    const auto fewer_than = [&](int64_t items) {
      return rows / (long_rows * walk.fold) * walk.channel_tiles < std::min(items, affordable);
    };
    while (fewer_than(ITEMS) && long_rows > 64) long_rows /= 2;
    for (; fewer_than(FEW_ITEMS) && width >= 512; width /= 2) cut_channels(channels, 2 * ((columns + width - 1) / width));
    chunks = chunks_of(group_starts, rows_a_sample, walk.fold * long_rows);
    walk.chunks = chunks.data();
  }

 private:
  void cut_channels(int64_t channels, int64_t tiles) {
    int64_t tile_channels = std::clamp<int64_t>((channels + tiles - 1) / tiles, 1, COLUMN_TILE / (walk.fold * walk.run));
    if (walk.run == 1 && tile_channels < channels) tile_channels = (tile_channels + 7) / 8 * 8;
    walk.tile_channels = tile_channels;
    walk.channel_tiles = (walk.channels + tile_channels - 1) / tile_channels;
  }
};

// [N] the group of each sample.
std::vector<int64_t> groups_of_samples(const std::vector<int64_t>& group_starts) {
  std::vector<int64_t> groups(group_starts.back());
  for (size_t group = 0; group + 1 < group_starts.size(); ++group)
    std::fill(groups.begin() + group_starts[group], groups.begin() + group_starts[group + 1], group);
  return groups;
}

// ---- forward ----

Tensor empty_output(const Tensor& x) { return Tensor(pooled_empty_like(x.get())); }

// Partial moments [partials, C] of every group, in order, merged into mean and var [G, C]. `counts` and `groups`
// [partials] are the elements a channel of each partial and its group.
template <typename A>
void merge_partials(const double* partial_mean, const double* partial_m2, const std::vector<double>& counts,
                    const std::vector<int64_t>& groups, int64_t channels, int64_t group_count, A* mean_out,
                    A* var_out) {
  const auto merge_channels = [&](int64_t begin, int64_t end) {
    std::vector<double> mean(end - begin), m2(end - begin);
    size_t partial = 0;
    for (int64_t group = 0; group < group_count; ++group) {
      std::fill(mean.begin(), mean.end(), 0.0);
      std::fill(m2.begin(), m2.end(), 0.0);
      double count = 0;
      for (; partial < groups.size() && groups[partial] == group; ++partial) {
        const MergeWeights weights = merge_weights(count, counts[partial]);
        for (int64_t c = begin; c < end; ++c) {
          const int64_t at = static_cast<int64_t>(partial) * channels + c;
          merge_moments(mean[c - begin], m2[c - begin], partial_mean[at], partial_m2[at], weights);
        }
        count += counts[partial];
      }
      for (int64_t c = begin; c < end; ++c) {
        mean_out[group * channels + c] = static_cast<A>(mean[c - begin]);
        var_out[group * channels + c] = static_cast<A>(count > 0 ? m2[c - begin] / count : 0.0);
      }
    }
  };
  const int64_t partials = static_cast<int64_t>(groups.size());
  if (channels) torch::stable::parallel_for(0, channels, 1 + ELEMENTS_PER_THREAD / (1 + partials), merge_channels);
}

// Runs the forward pass described by `f`, whose y, residual, scale, shift and mask are set; returns mean, var [G, C].
std::tuple<Tensor, Tensor> run_forward(Forward f, const Input& input, const Tensor& x,
                                       const std::vector<int64_t>& group_starts) {
  std::optional<CutPlanes> planes;
  std::optional<CutColumns> columns;
  if (walks_planes(input)) planes.emplace(input, group_starts);
  else columns.emplace(input, group_starts);
  const int64_t elements_a_row = planes ? input.plane_size : columns->walk.run;  // of one channel
  std::vector<int64_t> groups;
  std::vector<double> counts;
  for (const RowChunk& chunk : planes ? planes->chunks : columns->chunks) {
    groups.push_back(chunk.group);
    counts.push_back(static_cast<double>((chunk.end - chunk.begin) * elements_a_row));
  }
  const int64_t partials = static_cast<int64_t>(groups.size());
  const int64_t group_count = static_cast<int64_t>(group_starts.size()) - 1;
  const std::unique_ptr<double[]> workspace(new double[2 * partials * input.channels]);
  Tensor mean(empty_small({group_count, input.channels}, moment_dtype(x)));
  Tensor var(empty_small({group_count, input.channels}, moment_dtype(x)));

  f.dtype = input.dtype;
  f.channels = input.channels;
  f.plane_size = input.plane_size;
  f.x = x.const_data_ptr();
  f.partial_mean = workspace.get();
  f.partial_m2 = f.partial_mean + partials * input.channels;
  if (planes) {
    in_parallel(planes->items(), x.numel(),
                [&](int64_t begin, int64_t end) { kernels().forward_planes(f, planes->walk, begin, end); });
  } else {
    in_parallel(columns->items(), x.numel(),
                [&](int64_t begin, int64_t end) { kernels().forward_columns(f, columns->walk, begin, end); });
  }
  if (input.dtype == DType::float64) {
    merge_partials(f.partial_mean, f.partial_m2, counts, groups, input.channels, group_count,
                   mean.mutable_data_ptr<double>(), var.mutable_data_ptr<double>());
  } else {
    merge_partials(f.partial_mean, f.partial_m2, counts, groups, input.channels, group_count,
                   mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_forward(const Tensor& x, const OptionalTensor& residual,
                                                      const Tensor& scale, const Tensor& shift,
                                                      const Tensor& group_starts, const std::string& act,
                                                      double slope) {
  const Input input = check_x(x);
  const std::vector<int64_t> starts = check_group_starts(group_starts, x);
  const Tensor scale_c = check_statistics("scale", scale, x, {input.channels});
  const Tensor shift_c = check_statistics("shift", shift, x, {input.channels});

  Forward f{};
  f.act = parse_act(act);
  f.slope = slope;
  f.residual = check_like_x("residual", residual, x);
  f.scale = scale_c.const_data_ptr();
  f.shift = shift_c.const_data_ptr();
  Tensor y = empty_output(x);
  f.y = y.mutable_data_ptr();
  const bool needs_mask = residual && is_two_slope(f.act);
  Tensor mask = needs_mask ? empty_mask(x, input, true) : Tensor(empty_small({0}, ScalarType::Byte));
  f.mask = needs_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto [mean, var] = run_forward(f, input, x, starts);
  return {y, mean, var, mask};
}

// bn_forward, and the loss of this one site: weight · the mean over groups of the distance, with its gradients by mean and
// var.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_forward_with_targets(
    const Tensor& x, const OptionalTensor& residual, const Tensor& scale, const Tensor& shift, const Tensor& group_starts,
    const Tensor& target_mean, const Tensor& target_var, const OptionalTensor& classes, double weight,
    const std::string& act, double slope, const std::string& distance, bool use_std, double eps, double slack,
    double mean_weight, double var_weight) {
  const LossOptions options{parse_distance(distance), use_std, eps, slack, mean_weight, var_weight};
  const int64_t channels = check_x(x).channels, groups = check_group_starts_shape(group_starts, x).numel() - 1;
  const Targets targets = check_targets(target_mean, target_var, classes, x, moment_dtype(x), groups, channels);
  const auto [y, mean, var, mask] = bn_forward(x, residual, scale, shift, group_starts, act, slope);
  const LossInput input{{mean}, {var}, targets, Tensor(), moment_dtype(x), groups, 1, channels};
  const auto [loss, distances, dmean, dvar] = loss_on_cpu(input, {weight}, options, {groups, channels});
  return {y, mean, var, mask, loss, dmean, dvar};
}

std::tuple<Tensor, Tensor> group_moments(const Tensor& x, const Tensor& group_starts) {
  const Input input = check_x(x);
  return run_forward(Forward{}, input, x, check_group_starts(group_starts, x));
}

// ---- backward ----

// Runs the backward pass described by `f`, whose dy, residual, mask, scale, shift, dx and dresidual are set.
void run_backward(Backward f, const Input& input, const Tensor& x, const Tensor& mean, const OptionalTensor& dmean,
                  const OptionalTensor& dvar, const std::vector<int64_t>& group_starts) {
  const int64_t group_count = static_cast<int64_t>(group_starts.size()) - 1;
  const std::vector<int64_t> shape{group_count, input.channels};
  const Tensor mean_c = check_statistics("mean", mean, x, shape);
  const OptionalTensor dmean_c = check_statistics("dmean", dmean, x, shape);
  const OptionalTensor dvar_c = check_statistics("dvar", dvar, x, shape);
  std::vector<int64_t> counts(group_count);
  for (int64_t group = 0; group < group_count; ++group)
    counts[group] = (group_starts[group + 1] - group_starts[group]) * input.plane_size;

  f.dtype = input.dtype;
  f.channels = input.channels;
  f.plane_size = input.plane_size;
  f.x = x.const_data_ptr();
  f.mean = mean_c.const_data_ptr();
  f.dmean = data(dmean_c);
  f.dvar = data(dvar_c);
  f.counts = counts.data();
  if (walks_planes(input)) {
    const std::vector<int64_t> groups = groups_of_samples(group_starts);
    f.sample_groups = groups.data();
    in_parallel(input.samples * input.channels, x.numel(),
                [&](int64_t begin, int64_t end) { kernels().backward_planes(f, begin, end); });
  } else {
    const CutColumns columns(input, group_starts);
    in_parallel(columns.items(), x.numel(),
                [&](int64_t begin, int64_t end) { kernels().backward_columns(f, columns.walk, begin, end); });
  }
}

// bn_backward, dx written to `dx`, which may be dy; returns dresidual, or an empty tensor.
Tensor run_bn_backward(const OptionalTensor& dy, const Tensor& x, const OptionalTensor& residual, const Tensor& mask,
                       const Tensor& scale, const Tensor& shift, const Tensor& mean, const OptionalTensor& dmean,
                       const OptionalTensor& dvar, const Tensor& group_starts, const std::string& act, double slope,
                       bool want_dresidual, Tensor dx) {
  const Input input = check_x(x);
  const std::vector<int64_t> starts = check_group_starts(group_starts, x);
  const Tensor scale_c = check_statistics("scale", scale, x, {input.channels});
  const Tensor shift_c = check_statistics("shift", shift, x, {input.channels});

  Backward f{};
  f.act = parse_act(act);
  f.slope = slope;
  f.dy = check_like_x("dy", dy, x);
  f.residual = check_like_x("residual", residual, x);
  f.scale = scale_c.const_data_ptr();
  f.shift = shift_c.const_data_ptr();
  f.mask = check_mask(mask, x, input);
  f.dx = dx.mutable_data_ptr();
  Tensor dresidual = want_dresidual ? empty_output(x) : Tensor(empty_small({0}, x.scalar_type()));
  f.dresidual = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  run_backward(f, input, x, mean, dmean, dvar, starts);
  return dresidual;
}

std::tuple<Tensor, Tensor> bn_backward(const OptionalTensor& dy, const Tensor& x, const OptionalTensor& residual,
                                       const Tensor& mask, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                       const OptionalTensor& dmean, const OptionalTensor& dvar,
                                       const Tensor& group_starts, const std::string& act, double slope,
                                       bool want_dresidual) {
  const Tensor dx = empty_output(x);
  const Tensor dresidual = run_bn_backward(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act,
                                           slope, want_dresidual, dx);
  return {dx, dresidual};
}

// dx takes dy's place.
Tensor bn_backward_(const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const Tensor& mask,
                    const Tensor& scale, const Tensor& shift, const Tensor& mean, const OptionalTensor& dmean,
                    const OptionalTensor& dvar, const Tensor& group_starts, const std::string& act, double slope,
                    bool want_dresidual) {
  check_like_x("dy", dy, x);
  return run_bn_backward(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope,
                         want_dresidual, dy);
}

Tensor group_moments_backward(const Tensor& x, const Tensor& mean, const OptionalTensor& dmean,
                              const OptionalTensor& dvar, const Tensor& group_starts) {
  const Tensor dx = empty_output(x);
  Backward f{};
  f.dx = dx.mutable_data_ptr();
  run_backward(f, check_x(x), x, mean, dmean, dvar, check_group_starts(group_starts, x));
  return dx;
}

}  // namespace
}  // namespace bnfuse

STABLE_TORCH_LIBRARY(bnfuse_cpp, m) {
  m.def(
      "bn_forward(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor group_starts, str act, float slope) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_backward(Tensor? dy, Tensor x, Tensor? residual, Tensor mask, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor? dmean, Tensor? dvar, Tensor group_starts, str act, float slope, bool want_dresidual) "
      "-> (Tensor, Tensor)");
  m.def(
      "bn_backward_(Tensor(a!) dy, Tensor x, Tensor? residual, Tensor mask, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor? dmean, Tensor? dvar, Tensor group_starts, str act, float slope, bool want_dresidual) -> Tensor");
  m.def(
      "bn_forward_with_targets(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor group_starts, "
      "Tensor target_mean, Tensor target_var, Tensor? classes, float weight, str act, float slope, str distance, "
      "bool use_std, float eps, float slack, float mean_weight, float var_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");  // y, mean, var, mask, loss, dmean, dvar
  m.def("group_moments(Tensor x, Tensor group_starts) -> (Tensor, Tensor)");
  m.def("group_moments_backward(Tensor x, Tensor mean, Tensor? dmean, Tensor? dvar, Tensor group_starts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bnfuse_cpp, CPU, m) {
  m.impl("bn_forward", TORCH_BOX(&bnfuse::bn_forward));
  m.impl("bn_backward", TORCH_BOX(&bnfuse::bn_backward));
  m.impl("bn_backward_", TORCH_BOX(&bnfuse::bn_backward_));
  m.impl("bn_forward_with_targets", TORCH_BOX(&bnfuse::bn_forward_with_targets));
  m.impl("group_moments", TORCH_BOX(&bnfuse::group_moments));
  m.impl("group_moments_backward", TORCH_BOX(&bnfuse::group_moments_backward));
}
