// The forward kernels: y, the mask and the moments of x in one pass over it, and the small one that finishes the moments.
#pragma once

#include "activations.cuh"
#include "forward.h"
#include "moments.cuh"
#include "site_loss.cuh"

namespace bnfuse {
namespace {

// The bytes of packed planes' masks, from the bits of the vectors of one row: `staged` holds a byte of bits a thread, the
// next vector's after this one's. A byte belongs to the thread in whose vector it starts.
BNFUSE_DEVICE void store_packed_mask(const Walk& walk, const Columns& columns, const uint8_t* staged, uint8_t* mask_row) {
  const uint32_t next = columns.beside + 1 < walk.wide ? staged[threadIdx.x + 1] : 0;
  const uint32_t window = staged[threadIdx.x] | next << VECTOR;
  for_each_mask_bit(walk, columns, [&](int i, int64_t byte, int position) {
    if (position % 8 != 0) return;
    const int64_t rest = walk.run - position;
    const uint32_t bits = rest < 8 ? (1u << rest) - 1 : 0xffu;
    mask_row[byte] = uint8_t(window >> i & bits);
  });
}

template <typename T, Access ACCESS, bool RESIDUAL, ActKind KIND>
constexpr Places FORWARD_PLACES = PLACES<T, ACCESS, forward_is_lean(KIND, RESIDUAL, ACCESS == Access::planes)>;

// Moments of x, and y and its mask where they are wanted. RESIDUAL: there is one, and only then may there be a mask.
template <typename T, Access ACCESS, bool RESIDUAL, ActKind KIND>
__global__ void __launch_bounds__(FORWARD_PLACES<T, ACCESS, RESIDUAL, KIND>.threads,
                                  FORWARD_PLACES<T, ACCESS, RESIDUAL, KIND>.resident)
    forward_kernel(const __grid_constant__ ForwardPass f) {
  using A = Accumulator<T>;
  constexpr bool ALIGNED = ACCESS != Access::elements;
  constexpr int WANTED = VECTORS_IN_FLIGHT<T, RESIDUAL ? 2 : 1>;
  constexpr int FLIGHT = ACCESS == Access::planes && WANTED > MOST_IN_FLIGHT ? MOST_IN_FLIGHT : WANTED;
  const Walk& walk = f.walk;
  let_next_kernel_start();  // the one that finishes what is begun here
  if (f.counters && blockIdx.x == 0)
    for (int i = threadIdx.x; i <= walk.groups; i += blockDim.x) f.counters[i] = 0;

  const int64_t number = blockIdx.x / walk.tiles;
  const Chunk chunk = find_chunk(walk, f.group_starts, number);
  if (chunk.rows.begin >= chunk.rows.end) return;
  const Columns columns = columns_of_thread(walk, blockIdx.x % walk.tiles);

  const T* x = static_cast<const T*>(f.x);
  const T* residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const bool packs_mask = RESIDUAL && ACCESS == Access::packed && f.mask;
  const A slope = A(f.slope);
  PerChannel<A, ACCESS> scale, shift;
  scale.load(walk, columns, static_cast<const A*>(f.scale));
  shift.load(walk, columns, static_cast<const A*>(f.shift));
  Moments<A, ACCESS> moments;

  // Takes a vector's moments and writes its y, and its bits of the mask unless planes are packed; returns these.
  const auto use = [&](const Vector<T>& loaded, const Vector<T>& added, const Cursor<ACCESS>& at) {
    const int count = at.count();
    uint32_t bits = 0;
    A z[VECTOR];
    widen(loaded, z);
    moments.add(z, count);
    if (!y) return bits;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) z[i] = z[i] * scale[i] + shift[i];
    if (RESIDUAL) {
      A more[VECTOR];
      widen(added, more);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) z[i] += more[i];
      if (f.mask) {
        bits = upper_slope_bits<KIND>(z, f.act);
        if (!packs_mask) f.mask[at.byte] = uint8_t(bits & ((1u << count) - 1));
      }
    }
    activate<KIND>(z, f.act, slope);
    store<ALIGNED>(y + at.at, count, narrow<T>(z));
    return bits;
  };

  Cursor<ACCESS> ahead(walk, columns, chunk.rows), current = ahead;
  Vector<T> loaded[FLIGHT], added[FLIGHT];
  const auto load_next = [&](int u) {
    loaded[u] = load<ALIGNED>(x + ahead.at, ahead.count());
    if (RESIDUAL) added[u] = load<ALIGNED>(residual + ahead.at, ahead.count());
    ahead.advance(walk);
  };
  const auto use_next = [&](int u) {
    use(loaded[u], added[u], current);
    current.advance(walk);
  };
  const int32_t total = current.total();
  if (packs_mask) {
    for (int32_t k = 0, most = most_vectors(walk, chunk.rows); k < most; ++k) {
      uint8_t* staged = shared_memory();
      if (k < total) load_next(0);
      staged[threadIdx.x] = k < total ? uint8_t(use(loaded[0], added[0], current)) : 0;
      __syncthreads();
      if (k < total) store_packed_mask(walk, columns, staged, f.mask + current.byte);
      __syncthreads();
      current.advance(walk);
    }
  } else {
    int32_t k = 0;
    if (total >= FLIGHT) {  // as soon as a vector is used the next one is asked for in its place
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) load_next(u);
      for (; k + 2 * FLIGHT <= total; k += FLIGHT) {
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
          use_next(u);
          load_next(u);
        }
      }
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) use_next(u);
      k += FLIGHT;
    }
    for (; k < total; ++k) {
      load_next(0);
      use_next(0);
    }
  }
  write_partials(walk, columns, number, moments, SharedMoments<A>(shared_memory()), static_cast<Partial<A>*>(f.partials));
}

// mean and var [G, C] from the partial moments, in the order of the chunks; a team of threads a channel of a group.
template <typename A>
__global__ void __launch_bounds__(SMALL_THREADS, 1) finish_kernel(const __grid_constant__ Finish f) {
  const Walk& walk = f.walk;
  const int32_t channels_a_block = blockDim.x / f.team, lane = threadIdx.x % f.team;
  const int64_t blocks_a_group = (walk.channels + channels_a_block - 1) / channels_a_block;
  const int64_t group = blockIdx.x / blocks_a_group;
  const int64_t channel = blockIdx.x % blocks_a_group * channels_a_block + threadIdx.x / f.team;
  const Rows rows = rows_of_group(walk, f.group_starts, group);
  const int64_t entries = (rows.end - rows.begin + walk.chunk_rows - 1) / walk.chunk_rows * walk.parts;
  const bool exists = channel < walk.channels;
  if (f.counters && exists && lane == 0) prefetch_targets<A>(f, group, channel);
  wait_for_previous_kernel();

  PivotSums sums;
  double pivot = 0;
  if (exists && entries > 0) {
    // Entry e is part e % parts of the group's chunk e / parts.
    const int64_t stride = walk.channels * walk.parts;
    const Partial<A>* partials =
        static_cast<const Partial<A>*>(f.partials) + first_chunk(walk, rows, group) * stride + channel * walk.parts;
    const int64_t part_elements = int64_t(VECTOR) * walk.steps * walk.wide;
    pivot = partials[0].mean;
    const int64_t group_rows = rows.end - rows.begin;
    const auto chunk_of = [&](int64_t e) { return walk.parts == 1 ? e : e / walk.parts; };
    constexpr int HELD = 8;  // partial moments that are asked for before the first is used
    for (int64_t first = lane; first < entries; first += HELD * f.team) {
      Partial<A> partial[HELD];
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        const int64_t e = first + h * f.team, chunk = chunk_of(e);
        if (e < entries) partial[h] = partials[chunk * stride + (e - chunk * walk.parts)];
      }
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        const int64_t e = first + h * f.team, chunk = chunk_of(e), part = e - chunk * walk.parts;
        if (e >= entries) continue;
        const int64_t rows_left = group_rows - chunk * walk.chunk_rows, run_left = walk.run - part * part_elements;
        const int64_t here = rows_left < walk.chunk_rows ? rows_left : walk.chunk_rows;
        const int64_t run = walk.parts > 1 && run_left > part_elements ? part_elements : run_left;
        sums.add(double(here * run), partial[h].mean, partial[h].m2, pivot);
      }
    }
  }
  sums.add_up(f.team);
  if (exists && lane == 0) {
    static_cast<A*>(f.mean)[group * walk.channels + channel] = A(sums.count > 0 ? sums.mean(pivot) : 0.0);
    static_cast<A*>(f.var)[group * walk.channels + channel] = A(sums.count > 0 ? sums.m2() / sums.count : 0.0);
  }
  if (f.counters) finish_loss<A>(f, group, int32_t(blocks_a_group));
}

}  // namespace
}  // namespace bnfuse
