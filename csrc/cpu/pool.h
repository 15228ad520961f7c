// Memory of freed outputs, kept for the next ones.
//
// A step frees and allocates the same large activations again and again. The C library gives large blocks back to the
// system each time, and fresh pages cost several times what it takes to fill them. Blocks of the pool are kept instead;
// what is kept never exceeds what was in use at once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace bnfuse {

// An uninitialised tensor of x's dtype, shape and strides; x is dense and on the CPU. Small ones come from torch. The new
// handle is the caller's.
AtenTensorHandle pooled_empty_like(AtenTensorHandle x);

// An uninitialised contiguous tensor on the CPU, for what is small: made without the dispatcher, which would take longer than
// to fill it. The new handle is the caller's.
AtenTensorHandle empty_small(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype);

struct PoolUse {
  int64_t in_use, kept;  // bytes
};
PoolUse pool_use();

// Gives everything that is kept back to the system.
void empty_pool();

// Whether all these tensors are filled with NaN first, so that tests see an element that was not written.
void poison_pool(bool poison);

}  // namespace bnfuse
