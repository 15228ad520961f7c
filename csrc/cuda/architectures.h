// What nvcc was asked to build.
#pragma once

#include <string>
#include <vector>

namespace bnfuse {

// As sm_80, sm_90, ascending.
std::vector<std::string> cuda_architectures();

}  // namespace bnfuse
