// The loss on the CPU, for the operators that contain it.
#pragma once

#include <tuple>
#include <vector>

#include "../loss_input.h"

namespace bnfuse {

// loss [], distances [G, S], and its gradients by mean and var, every site's [G, C] one after the other, in tensors of the
// shape given, of G·T elements. `site_weights` [S] stand in for those of the input.
std::tuple<Tensor, Tensor, Tensor, Tensor> loss_on_cpu(const LossInput& input, const std::vector<double>& site_weights,
                                                       const LossOptions& options,
                                                       const std::vector<int64_t>& gradient_shape);

}  // namespace bnfuse
