// csrc/cuda/device.h's names where the device is the CPU's emulation of one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cuda_emulation.h"

namespace bnfuse {

// One operator: what it may access is what it reads and writes between its Device's first and last moment.
struct Device {
  Stream stream = nullptr;
  int64_t multiprocessors = emulation::emulator.multiprocessors;

  explicit Device(const torch::stable::Tensor&) { emulation::emulator.tensor_count = 0; }
};

inline const void* allowed(const torch::stable::Tensor& tensor, bool writable) {
  emulation::allow(tensor.data_ptr(), tensor.numel() * tensor.element_size(), writable);
  return tensor.data_ptr();
}

inline const void* read(const torch::stable::Tensor& tensor) { return allowed(tensor, false); }
inline void* written(const torch::stable::Tensor& tensor) { return const_cast<void*>(allowed(tensor, true)); }

}  // namespace bnfuse
