#include "forward.cuh"

namespace bnfuse {
namespace {

template <typename T, bool RESIDUAL>
void (*forward_kernel_for(const Walk& walk))(ForwardPass) {
  if constexpr (sizeof(T) < 8) {  // float64 is for tests of gradients, and has one kernel
    if (walk.aligned && walk.layout == Layout::planes) return forward_kernel<T, Access::planes, RESIDUAL>;
    if (walk.aligned) return forward_kernel<T, Access::rows, RESIDUAL>;
  }
  return forward_kernel<T, Access::elements, RESIDUAL>;
}

template <typename T>
void launch_forward(const ForwardPass& forward, const Finish& finish, Stream stream) {
  using A = Accumulator<T>;
  const Walk& walk = forward.walk;
  launch("bn_forward", forward.residual ? forward_kernel_for<T, true>(walk) : forward_kernel_for<T, false>(walk), walk.blocks(),
         walk.threads(), SharedMoments<A>::bytes(walk.threads()), stream, forward);
  const int64_t channels_a_block = MOST_THREADS / finish.team;
  launch("bn_forward's moments", finish_kernel<A>, (walk.channels + channels_a_block - 1) / channels_a_block * walk.groups,
         MOST_THREADS, finish.counters ? LOSS_SHARED_BYTES : 0, stream, finish);
}

}  // namespace

void forward_on_cuda(DType dtype, const ForwardPass& forward, const Finish& finish, Stream stream) {
  switch (dtype) {
    case DType::float32: return launch_forward<float>(forward, finish, stream);
    case DType::float64: return launch_forward<double>(forward, finish, stream);
    case DType::bfloat16: return launch_forward<BFloat16>(forward, finish, stream);
    case DType::float16: return launch_forward<Half>(forward, finish, stream);
  }
}

}  // namespace bnfuse
