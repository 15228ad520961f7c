// What the operators of every device check of their arguments before they run, and what follows from shapes alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bn_math.h"
#include "describe.h"
#include "elements.h"

namespace bnfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : !b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// ---- x [N, C, *spatial] ----

inline bool rows_are_contiguous(const Tensor& x) {  // channels_last, in any number of spatial dimensions
  int64_t expected = 1;
  const auto matches = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fits;
  };
  if (!matches(1)) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim)
    if (!matches(dim)) return false;
  return matches(0);
}

struct Input {
  DType dtype;
  int64_t samples, channels, plane_size;  // N, C, L
  bool planes;                            // the walk: planes, or rows
};

inline Input check_x(const Tensor& x) {
  Input input;
  switch (x.scalar_type()) {
    case ScalarType::Float: input.dtype = DType::float32; break;
    case ScalarType::Double: input.dtype = DType::float64; break;
    case ScalarType::BFloat16: input.dtype = DType::bfloat16; break;
    case ScalarType::Half: input.dtype = DType::float16; break;
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16, got ", describe(x));
  }
  STD_TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5, "x must be [N, C, *spatial] with 0 to 3 spatial dimensions, got ",
                  describe(x));
  input.samples = x.size(0);
  input.channels = x.size(1);
  input.plane_size = x.numel() / std::max<int64_t>(1, x.size(0) * x.size(1));
  const bool contiguous = x.is_contiguous();
  STD_TORCH_CHECK(x.numel() == 0 || contiguous || rows_are_contiguous(x), "x must be contiguous or channels_last, got ",
                  describe(x));
  input.planes = contiguous && x.numel() > x.size(0) * x.size(1);
  return input;
}

// Strides of dimensions of size 1 address nothing and may differ.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) != b.size(dim)) return false;
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim) && a.numel() > 0) return false;
  }
  return true;
}

inline const void* check_like_x(const char* name, const OptionalTensor& tensor, const Tensor& x) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(same_device(*tensor, x) && tensor->scalar_type() == x.scalar_type() && same_layout(*tensor, x), name,
                  " must have x's dtype, shape and strides, ", describe(x), ", got ", describe(*tensor));
  return tensor->const_data_ptr();
}

// ---- statistics and groups ----

inline ScalarType moment_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A small tensor that goes with x, of this dtype and shape.
inline void check_small(const char* name, const Tensor& tensor, const Tensor& x, ScalarType dtype,
                        const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(same_device(tensor, x) && tensor.scalar_type() == dtype && sizes.size() == shape.size() &&
                      std::equal(shape.begin(), shape.end(), sizes.begin()),
                  name, " must be ", dtype_name(dtype), " ", list(shape), on_device(x), ", got ", describe(tensor));
}

inline Tensor made_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Statistics of x, made contiguous; `shape` is [C] or [G, C].
inline Tensor check_statistics(const char* name, const Tensor& tensor, const Tensor& x, const std::vector<int64_t>& shape) {
  check_small(name, tensor, x, moment_dtype(x), shape);
  return made_contiguous(tensor);
}

inline OptionalTensor check_statistics(const char* name, const OptionalTensor& tensor, const Tensor& x,
                                       const std::vector<int64_t>& shape) {
  if (!tensor) return std::nullopt;
  return check_statistics(name, *tensor, x, shape);
}

inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// int64 [G + 1], made contiguous. What its values must be is known where they can be read without waiting.
inline Tensor check_group_starts_shape(const Tensor& group_starts, const Tensor& x) {
  STD_TORCH_CHECK(same_device(group_starts, x) && group_starts.scalar_type() == ScalarType::Long &&
                      group_starts.dim() == 1 && group_starts.numel() >= 2,
                  "group_starts must be int64 [G + 1] with at least one group", on_device(x), ", got ",
                  describe(group_starts));
  return made_contiguous(group_starts);
}

// ---- activations and their mask ----

inline Act parse_act(const std::string& act) {
  const std::array<const char*, 6> names{"identity", "relu", "relu6", "leaky_relu", "silu", "hardswish"};
  for (size_t i = 0; i < names.size(); ++i)
    if (act == names[i]) return static_cast<Act>(i);
  STD_TORCH_CHECK(false, "act must be one of identity, relu, relu6, leaky_relu, silu, hardswish, got '", act, "'");
}

// As reference.mask_shape.
inline std::array<int64_t, 2> mask_shape(const Input& input) {
  const int64_t positions = input.samples * input.plane_size;
  if (input.planes) return {input.samples * input.channels, (input.plane_size + 7) / 8};
  return {input.channels ? positions : 0, (input.channels + 7) / 8};
}

// An empty mask where none is needed.
inline Tensor empty_mask(const Tensor& x, const Input& input, bool needed) {
  const auto [rows, bytes] = mask_shape(input);
  return needed ? torch::stable::new_empty(x, {rows, bytes}, ScalarType::Byte)
                : torch::stable::new_empty(x, {0}, ScalarType::Byte);
}

// The mask given to a backward pass, null where it is empty.
inline const uint8_t* check_mask(const Tensor& mask, const Tensor& x, const Input& input) {
  if (!mask.numel()) return nullptr;
  const auto [rows, bytes] = mask_shape(input);
  STD_TORCH_CHECK(same_device(mask, x) && mask.scalar_type() == ScalarType::Byte && mask.dim() == 2 &&
                      mask.size(0) == rows && mask.size(1) == bytes && mask.is_contiguous(),
                  "mask must be contiguous uint8 [", rows, ", ", bytes, "]", on_device(x), " or empty, got ",
                  describe(mask));
  return mask.const_data_ptr<uint8_t>();
}

}  // namespace bnfuse
