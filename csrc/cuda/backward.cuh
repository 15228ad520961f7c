// The backward kernel: dx = scale·act'·dy + ∂L/∂mean / M + 2·∂L/∂var·(x − mean) / M, and d residual = act'·dy, in one pass.
#pragma once

#include "activations.cuh"
#include "backward.h"
#include "walk.cuh"

namespace bnfuse {
namespace {

// The mask's bits of a vector in packed planes: bytes of the row are loaded where the vector starts and where they start.
BNFUSE_DEVICE uint32_t load_packed_mask(const Walk& walk, const Columns& columns, const uint8_t* mask_row) {
  uint32_t bits = 0, loaded = 0;
  for_each_mask_bit(walk, columns, [&](int i, int64_t byte, int position) {
    if (i == 0 || position % 8 == 0) loaded = mask_row[byte];
    bits |= (loaded >> (position % 8) & 1u) << i;
  });
  return bits;
}

template <typename T, Access ACCESS, Derivative DERIVATIVE>
__global__ void __launch_bounds__(PLACES<T, ACCESS, backward_is_lean(DERIVATIVE)>.threads,
                                  PLACES<T, ACCESS, backward_is_lean(DERIVATIVE)>.resident)
    backward_kernel(const __grid_constant__ BackwardPass f) {
  using A = Accumulator<T>;
  constexpr bool ALIGNED = ACCESS != Access::elements, RESIDUAL = DERIVATIVE == Derivative::residual;
  constexpr bool MASK = DERIVATIVE == Derivative::mask, DERIVES = !MASK && DERIVATIVE != Derivative::one;
  constexpr ActKind KIND = DERIVATIVE == Derivative::relu ? ActKind::relu : ActKind::any;
  constexpr int FLIGHT = VECTORS_IN_FLIGHT<T, RESIDUAL ? 3 : 2>;
  const Walk& walk = f.walk;
  const Chunk chunk = find_chunk(walk, f.group_starts, blockIdx.x / walk.tiles);
  if (chunk.rows.begin >= chunk.rows.end) return;
  const Columns columns = columns_of_thread(walk, blockIdx.x % walk.tiles);

  const T* dy = static_cast<const T*>(f.dy);  // may be dx: an element is read before it is written, by one thread
  const T* x = static_cast<const T*>(f.x);
  const T* residual = static_cast<const T*>(f.residual);
  T* dx = static_cast<T*>(f.dx);
  T* dresidual = static_cast<T*>(f.dresidual);
  const bool reads_x = DERIVES || f.dvar;
  const A slope = A(f.slope), below = A(lower_slope(f.act, f.slope));

  Cursor<ACCESS> ahead(walk, columns, chunk.rows), current = ahead;
  Vector<T> gradient[FLIGHT], input[FLIGHT], added[FLIGHT];
  uint32_t bits[FLIGHT];
  const auto load_next = [&](int u) {
    const int count = ahead.count();
    if (dy) gradient[u] = load<ALIGNED>(dy + ahead.at, count);
    if (reads_x) input[u] = load<ALIGNED>(x + ahead.at, count);
    if (RESIDUAL) added[u] = load<ALIGNED>(residual + ahead.at, count);
    if (MASK) bits[u] = ACCESS == Access::packed ? load_packed_mask(walk, columns, f.mask + ahead.byte) : f.mask[ahead.byte];
    ahead.advance(walk);
  };
  const int32_t total = current.total();
  if (total >= FLIGHT) {  // while these come, so do the channels' coefficients
#pragma unroll
    for (int u = 0; u < FLIGHT; ++u) load_next(u);
  }

  PerChannel<A, ACCESS> scale, shift, mean, of_mean, of_var;
  if (dy) scale.load(walk, columns, static_cast<const A*>(f.scale));
  if (DERIVES) shift.load(walk, columns, static_cast<const A*>(f.shift));
  const A elements = A((chunk.group_rows.end - chunk.group_rows.begin) * walk.run);
  const int64_t group_at = chunk.group * walk.channels;
  if (f.dmean) {
    of_mean.load(walk, columns, static_cast<const A*>(f.dmean) + group_at);
    of_mean.transform([&](A dmean) { return mean_coefficient(dmean, elements); });
  }
  if (f.dvar) {
    mean.load(walk, columns, static_cast<const A*>(f.mean) + group_at);
    of_var.load(walk, columns, static_cast<const A*>(f.dvar) + group_at);
    of_var.transform([&](A dvar) { return var_coefficient(dvar, elements); });
  }

  const auto use_next = [&](int u) {
    const int count = current.count();
    A dz[VECTOR] = {}, result[VECTOR];  // act'·dy; dx
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) result[i] = of_mean[i];
    if (f.dvar) {
      A values[VECTOR];
      widen(input[u], values);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) result[i] += of_var[i] * (values[i] - mean[i]);
    }
    if (dy) {
      widen(gradient[u], dz);
      if (MASK) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) dz[i] *= bits[u] >> i & 1u ? A(1) : below;
      } else if (DERIVES) {
        A z[VECTOR];
        widen(input[u], z);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) z[i] = z[i] * scale[i] + shift[i];
        if (RESIDUAL) {
          A more[VECTOR];
          widen(added[u], more);
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) z[i] += more[i];
        }
        differentiate<KIND>(z, f.act, slope);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) dz[i] *= z[i];
      }
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) result[i] += scale[i] * dz[i];
    }
    store<ALIGNED>(dx + current.at, count, narrow<T>(result));
    if (dresidual) store<ALIGNED>(dresidual + current.at, count, narrow<T>(dz));
    current.advance(walk);
  };
  int32_t k = 0;
  for (; k + FLIGHT <= total; k += FLIGHT) {
    if (k > 0) {
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) load_next(u);
    }
#pragma unroll
    for (int u = 0; u < FLIGHT; ++u) use_next(u);
  }
  for (; k < total; ++k) {
    load_next(0);
    use_next(0);
  }
}

}  // namespace
}  // namespace bnfuse
