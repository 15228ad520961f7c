// Moments in registers, and their combination within a block.
#pragma once

#include "walk.cuh"

namespace bnfuse {
namespace {

// Sums of moments about a pivot. They are plain sums, so threads add them up in any fixed tree. The pivot is the mean of one
// of the sets: if it lies far from all others, its own set makes the whole variance large, and nothing cancels.
struct PivotSums {
  double count = 0, s = 0, q = 0;  // Σn, Σn·(mean − pivot), Σ(m2 + n·(mean − pivot)²)

  BNFUSE_DEVICE void add(double n, double mean, double m2, double pivot) {
    const double delta = mean - pivot;
    count += n;
    s += n * delta;
    q += m2 + n * delta * delta;
  }

  // The sums of `team` neighbouring threads, in each of them. All threads of the warp take part.
  BNFUSE_DEVICE void add_up(int team) {
    for (int distance = 1; distance < team; distance *= 2) {
      count += __shfl_xor_sync(0xffffffffu, count, distance);
      s += __shfl_xor_sync(0xffffffffu, s, distance);
      q += __shfl_xor_sync(0xffffffffu, q, distance);
    }
  }

  BNFUSE_DEVICE double mean(double pivot) const { return pivot + s / count; }
  BNFUSE_DEVICE double m2() const { return centred_m2(s, q, 1.0 / count); }
};

// One set of moments for each of a thread's eight elements, since each may have a channel of its own (Welford 1962): no
// difference of large sums is ever taken, wherever the mean is.
template <typename A, Access ACCESS>
struct Moments {
  static constexpr bool WHOLE = ACCESS != Access::elements;  // every vector has all its elements: one count for all
  A mean[VECTOR] = {};
  A m2[VECTOR] = {};  // Σ(x − mean)²
  int32_t counts[WHOLE ? 1 : VECTOR] = {};

  BNFUSE_DEVICE int32_t count(int i) const { return counts[WHOLE ? 0 : i]; }

  // The first `present` of eight elements.
  BNFUSE_DEVICE void add(const A (&x)[VECTOR], int present) {
    A share = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (!WHOLE && i >= present) continue;
      if (!WHOLE || i == 0) share = reciprocal(A(++counts[i]));
      const A before = x[i] - mean[i];
      mean[i] += before * share;
      m2[i] += before * (x[i] - mean[i]);
    }
  }

  // All as one set: they are of one channel.
  BNFUSE_DEVICE PivotSums sums() const {
    PivotSums sums;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      if (count(i) > 0) sums.add(count(i), mean[i], m2[i], mean[0]);
    return sums;
  }
};

// (mean, m2), as partial moments are stored.
template <typename A>
struct alignas(2 * sizeof(A)) Partial {
  A mean, m2;
};

// A block's shared memory: the moments of its threads' elements, or of its threads where each has one channel. Element i of all
// threads comes before element i + 1, so that neighbouring threads meet different banks; so do neighbouring elements of a few
// threads, by the four words between.
template <typename A>
struct SharedMoments {
  static constexpr int APART = 4;
  A* mean;         // [8, threads + APART]
  A* m2;           // the same
  int32_t* count;  // [threads]: of each of the thread's sets

  BNFUSE_DEVICE explicit SharedMoments(unsigned char* memory)
      : mean(reinterpret_cast<A*>(memory)),
        m2(mean + VECTOR * (blockDim.x + APART)),
        count(reinterpret_cast<int32_t*>(m2 + VECTOR * (blockDim.x + APART))) {}

  BNFUSE_DEVICE static int32_t place(int32_t thread, int32_t i) { return i * (blockDim.x + APART) + thread; }

  static int64_t bytes(int threads) {
    return 2 * VECTOR * (threads + APART) * int64_t(sizeof(A)) + threads * int64_t(sizeof(int32_t));
  }
};

// Combines what the threads of a block have found, and writes one partial moment for each channel of the tile.
template <typename A, Access ACCESS>
BNFUSE_DEVICE void write_partials(const Walk& walk, const Columns& columns, int64_t chunk, const Moments<A, ACCESS>& moments,
                                  SharedMoments<A> shared, Partial<A>* partials) {
  const bool one_channel =
      ACCESS == Access::elements ? walk.layout == Layout::planes : ACCESS == Access::planes;
  if (one_channel) {
    const PivotSums sums = moments.sums();
    shared.count[threadIdx.x] = int32_t(sums.count);
    if (sums.count > 0) {
      shared.mean[threadIdx.x] = A(sums.mean(moments.mean[0]));
      shared.m2[threadIdx.x] = A(sums.m2());
    }
  } else {
    shared.count[threadIdx.x] = moments.count(0);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      shared.mean[shared.place(threadIdx.x, i)] = moments.mean[i];
      shared.m2[shared.place(threadIdx.x, i)] = moments.m2[i];
    }
  }
  __syncthreads();

  // A channel's sets: `beside` in each of the `high` rows of threads, one after the other. Teams that stand side by side have
  // channels of neighbouring threads where they can.
  const int32_t sets = one_channel ? 1 : VECTOR;  // of a thread
  const int32_t beside = walk.layout == Layout::rows     ? 1
                         : walk.layout == Layout::packed ? int32_t(walk.run)
                         : walk.tile_channels == 1       ? walk.wide
                                                         : int32_t(walk.run_vectors);
  const int32_t teams = blockDim.x / walk.team, lane = threadIdx.x % walk.team;
  for (int32_t first = 0; first < columns.tile_channels; first += teams) {
    const int32_t number = first + threadIdx.x / walk.team;
    const bool exists = number < columns.tile_channels;
    const int32_t vectors = columns.tile_channels / VECTOR;
    const int32_t channel = ACCESS == Access::rows ? number % vectors * VECTOR + number / vectors : number;
    PivotSums sums;
    double pivot = 0;
    if (exists) {
      const int32_t element = channel * beside;  // of a row of threads
      pivot = shared.mean[shared.place(element / sets, element % sets)];
      for (int32_t at = lane; at < walk.high * beside; at += walk.team) {
        const int32_t here = element + at % beside, thread = at / beside * walk.wide + here / sets;
        const int32_t set = shared.place(thread, here % sets), count = shared.count[thread];
        if (count > 0) sums.add(count, shared.mean[set], shared.m2[set], pivot);
      }
    }
    sums.add_up(walk.team);
    if (exists && lane == 0) {
      const int64_t at = (chunk * walk.channels + columns.first_channel + channel) * walk.parts + columns.part;
      partials[at] = {A(sums.mean(pivot)), A(sums.m2())};
    }
  }
}

}  // namespace
}  // namespace bnfuse
