#include "backward.cuh"

namespace bnfuse {
namespace {

template <typename T, bool RESIDUAL>
void (*backward_kernel_for(const Walk& walk))(BackwardPass) {
  if constexpr (sizeof(T) < 8) {  // float64 is for tests of gradients, and has one kernel
    if (walk.aligned && walk.layout == Layout::planes) return backward_kernel<T, Access::planes, RESIDUAL>;
    if (walk.aligned) return backward_kernel<T, Access::rows, RESIDUAL>;
  }
  return backward_kernel<T, Access::elements, RESIDUAL>;
}

template <typename T>
void launch_backward(const BackwardPass& backward, Stream stream) {
  const Walk& walk = backward.walk;
  const bool derives_from_residual =
      backward.dy && backward.residual && !backward.mask && backward.act != Act::identity;
  launch("bn_backward", derives_from_residual ? backward_kernel_for<T, true>(walk) : backward_kernel_for<T, false>(walk),
         walk.blocks(), walk.threads(), 0, stream, backward);
}

}  // namespace

void backward_on_cuda(DType dtype, const BackwardPass& backward, Stream stream) {
  switch (dtype) {
    case DType::float32: return launch_backward<float>(backward, stream);
    case DType::float64: return launch_backward<double>(backward, stream);
    case DType::bfloat16: return launch_backward<BFloat16>(backward, stream);
    case DType::float16: return launch_backward<Half>(backward, stream);
  }
}

}  // namespace bnfuse
