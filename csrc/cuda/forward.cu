#include "forward.cuh"

namespace bnfuse {
namespace {

template <typename T, bool RESIDUAL, ActKind KIND>
void (*forward_kernel_of(const Walk& walk))(ForwardPass) {
  if constexpr (sizeof(T) < 8) {  // float64 is for tests of gradients, and has one kernel
    if (walk.aligned && walk.layout == Layout::planes) return forward_kernel<T, Access::planes, RESIDUAL, KIND>;
    if (walk.aligned && walk.layout == Layout::packed) return forward_kernel<T, Access::packed, RESIDUAL, KIND>;
    if (walk.aligned) return forward_kernel<T, Access::rows, RESIDUAL, KIND>;
  }
  return forward_kernel<T, Access::elements, RESIDUAL, ActKind::any>;
}

template <typename T, bool RESIDUAL>
void (*forward_kernel_for(const ForwardPass& forward))(ForwardPass) {
  switch (kind_of(forward.act)) {
    case ActKind::identity: return forward_kernel_of<T, RESIDUAL, ActKind::identity>(forward.walk);
    case ActKind::relu: return forward_kernel_of<T, RESIDUAL, ActKind::relu>(forward.walk);
    default: return forward_kernel_of<T, RESIDUAL, ActKind::any>(forward.walk);
  }
}

template <typename T>
void launch_forward(const ForwardPass& forward, const Finish& finish, Stream stream) {
  using A = Accumulator<T>;
  const Walk& walk = forward.walk;
  launch("bn_forward", forward.residual ? forward_kernel_for<T, true>(forward) : forward_kernel_for<T, false>(forward),
         walk.blocks(), walk.threads(), SharedMoments<A>::bytes(walk.threads()), stream, forward);
  const int64_t channels_a_block = SMALL_THREADS / finish.team;
  launch<true>("bn_forward's moments", finish_kernel<A>,
               (walk.channels + channels_a_block - 1) / channels_a_block * walk.groups, SMALL_THREADS,
               finish.counters ? LOSS_SHARED_BYTES : 0, stream, finish);
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
