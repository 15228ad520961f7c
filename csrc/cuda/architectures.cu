#include "architectures.h"

namespace bnfuse {

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  for (const int architecture : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(architecture / 10));
  return names;
}

}  // namespace bnfuse
