// Chooses the set of kernels that runs on this processor.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bnfuse {
namespace {

struct Choice {
  const char* name;  // as in BNFUSE_INSTRUCTION_SET
  const Kernels* kernels;
  bool supported;
};

const Kernels& choose() {
  // Fastest first.
  const Choice choices[] = {
#ifdef __x86_64__
      {"avx512", &kernels_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"avx2", &kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {"baseline", &kernels_baseline, true},
  };
  const char* wanted = std::getenv("BNFUSE_INSTRUCTION_SET");
  const bool forced = wanted != nullptr && *wanted != '\0';
  std::string built;
  for (const Choice& choice : choices) {
    if (!forced && choice.supported) return *choice.kernels;
    if (forced && std::string(wanted) == choice.name) {
      if (choice.supported) return *choice.kernels;
      throw std::runtime_error(std::string("BNFUSE_INSTRUCTION_SET asks for ") + wanted +
                               ", which this processor does not support; unset it to let bnfuse choose");
    }
    built += (built.empty() ? "" : ", ") + std::string(choice.name);
  }
  throw std::runtime_error(std::string("BNFUSE_INSTRUCTION_SET is '") + wanted + "', expected one of " + built);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace bnfuse
