// Tensors in words, for the messages of errors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

namespace bnfuse {

inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    default: return "another dtype";
  }
}

template <typename Values>
std::string list(const Values& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// Nothing for the CPU, where tensors mostly are.
inline std::string on_device(const torch::stable::Tensor& tensor) {
  return tensor.is_cpu() ? "" : (tensor.is_cuda() ? " on cuda:" : " on device ") + std::to_string(tensor.get_device_index());
}

inline std::string describe(const torch::stable::Tensor& tensor) {
  return std::string(dtype_name(tensor.scalar_type())) + " " + list(tensor.sizes()) + " with strides " +
         list(tensor.strides()) + on_device(tensor);
}

}  // namespace bnfuse
