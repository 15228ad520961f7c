// The device that x is on, for the time of one operator: it is made the current one, and its stream and size are known.
#pragma once

#ifdef BNFUSE_EMULATED
#include "emulated_device.h"
#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "runtime.h"

namespace bnfuse {

struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;
  int64_t multiprocessors;

  explicit Device(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    const int32_t index = x.get_device_index();
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<Stream>(current);
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    if (error != cudaSuccess) (void)cudaGetLastError();  // it is told here, and not left for whoever asks next
    STD_TORCH_CHECK(error == cudaSuccess, "cannot ask cuda:", index, " for its size: ", cudaGetErrorString(error));
    multiprocessors = count;
  }
};

// A tensor's memory, as kernels are given it.
inline const void* read(const torch::stable::Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* written(const torch::stable::Tensor& tensor) { return tensor.mutable_data_ptr(); }

}  // namespace bnfuse
#endif  // BNFUSE_EMULATED
