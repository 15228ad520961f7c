#include "backward.cuh"

namespace bnfuse {
namespace {

template <typename T, Derivative DERIVATIVE>
void (*backward_kernel_of(const Walk& walk))(BackwardPass) {
  if constexpr (sizeof(T) < 8) {  // float64 is for tests of gradients, and has one kernel each
    if (walk.aligned && walk.layout == Layout::planes) return backward_kernel<T, Access::planes, DERIVATIVE>;
    if (walk.aligned && walk.layout == Layout::packed) return backward_kernel<T, Access::packed, DERIVATIVE>;
    if (walk.aligned) return backward_kernel<T, Access::rows, DERIVATIVE>;
  }
  return backward_kernel<T, Access::elements, DERIVATIVE == Derivative::relu ? Derivative::any : DERIVATIVE>;
}

template <typename T>
void (*backward_kernel_for(const BackwardPass& backward))(BackwardPass) {
  switch (derivative_of(backward)) {
    case Derivative::one: return backward_kernel_of<T, Derivative::one>(backward.walk);
    case Derivative::mask: return backward_kernel_of<T, Derivative::mask>(backward.walk);
    case Derivative::relu: return backward_kernel_of<T, Derivative::relu>(backward.walk);
    case Derivative::residual: return backward_kernel_of<T, Derivative::residual>(backward.walk);
    default: return backward_kernel_of<T, Derivative::any>(backward.walk);
  }
}

template <typename T>
void launch_backward(const BackwardPass& backward, Stream stream) {
  const Walk& walk = backward.walk;
  launch("bn_backward", backward_kernel_for<T>(backward), walk.blocks(), walk.threads(), 0, stream, backward);
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
