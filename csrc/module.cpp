// The Python module bnfuse._C: importing it registers the operators; its functions say what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#ifdef BNFUSE_CUDA
#include "cuda/architectures.h"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

std::vector<std::string> instruction_sets() {
  return {
#ifdef __x86_64__
      bnfuse::kernels_avx512.instruction_set, bnfuse::kernels_avx2.instruction_set,
#endif
      bnfuse::kernels_baseline.instruction_set};
}

std::vector<std::string> cuda_architectures() {
#ifdef BNFUSE_CUDA
  return bnfuse::cuda_architectures();
#else
  return {};
#endif
}

std::optional<std::string> environment(const char* name) {
  const char* const value = std::getenv(name);
  return value ? std::optional<std::string>(value) : std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "bnfuse's compiled kernels, and what was built.";
  bnfuse::kernels();  // an instruction set that cannot run here is an error of the import
  module.def("compiler", &compiler, "The compiler that built the extension.");
  module.def("instruction_set", [] { return std::string(bnfuse::kernels().instruction_set); },
             "The instruction set that runs on this processor.");
  module.def("instruction_sets", &instruction_sets, "The instruction sets that were built, fastest first.");
  module.def("cuda_architectures", &cuda_architectures,
             "The CUDA architectures that were built, such as sm_90; none where the kernels are for the CPU alone.");
  module.def("environment", &environment, "A variable of the process's environment, as it is now; None where there is none.");
  module.def("empty_pool", &bnfuse::empty_pool, "Gives the memory kept for activations back to the system.");
  module.def("poison_pool", &bnfuse::poison_pool, "Whether memory for activations is filled with NaN first, for tests.");
  module.def(
      "pool_use", [] { return std::make_pair(bnfuse::pool_use().in_use, bnfuse::pool_use().kept); },
      "Bytes of activations in use, and of memory kept for the next ones.");
  module.def("torch_version", [] { return std::string(BNFUSE_TORCH_VERSION); }, "The torch built against.");
}
