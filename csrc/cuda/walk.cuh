// Where a block and each of its threads stand in x: the device's side of walk.h.
#pragma once

#include "vectors.cuh"
#include "walk.h"

namespace bnfuse {
namespace {

// What a kernel is compiled for; the fastest that fits x runs.
enum class Access {
  elements,  // any layout and alignment, element by element
  rows,      // whole vectors of eight channels: Layout::rows
  planes,    // whole vectors of one channel: Layout::planes
  packed,    // whole vectors of neighbouring planes: Layout::packed
};

// Whether a thread has one vector of a row at most.
template <Access ACCESS>
constexpr bool ONE_A_ROW = ACCESS == Access::rows || ACCESS == Access::packed;

// ---- groups and chunks ----

struct Rows {
  int64_t begin, end;
};

// The rows of a group. Starts that do not fit x, which the host cannot see, lead nowhere outside of it; a single group is all of
// it whatever they are, so that nothing waits for them.
BNFUSE_DEVICE Rows rows_of_group(const Walk& walk, const int64_t* group_starts, int64_t group) {
  if (walk.groups == 1) return {0, walk.rows};
  const int64_t samples = walk.rows / walk.rows_a_sample;
  int64_t begin = group_starts[group], end = group_starts[group + 1];
  begin = begin < 0 ? 0 : begin > samples ? samples : begin;
  end = end < begin ? begin : end > samples ? samples : end;
  return {begin * walk.rows_a_sample, end * walk.rows_a_sample};
}

// The number of a group's first chunk. A group that starts at row s and has n rows takes ⌈n / R⌉ numbers, and from its
// first to the next group's there are ⌊(s + n) / R⌋ + 1 − ⌊s / R⌋ ≥ ⌈n / R⌉: no sum over the groups before it is needed.
BNFUSE_DEVICE int64_t first_chunk(const Walk& walk, Rows rows, int64_t group) {
  return rows.begin / walk.chunk_rows + group;
}

struct Chunk {
  int64_t group;
  Rows rows;  // of the chunk; none where the number belongs to no chunk
  Rows group_rows;
};

// All threads of a block together.
BNFUSE_DEVICE Chunk find_chunk(const Walk& walk, const int64_t* group_starts, int64_t number) {
  int64_t group = 0;
  if (walk.groups > 1) {
    int64_t not_after = 0;  // groups whose first chunk does not come after this one
    for (int64_t base = 0; base < walk.groups; base += blockDim.x) {
      const int64_t g = base + threadIdx.x;
      const bool counts = g < walk.groups && first_chunk(walk, rows_of_group(walk, group_starts, g), g) <= number;
      not_after += __syncthreads_count(counts);
    }
    if (not_after == 0) return {0, {0, 0}, {0, 0}};  // of starts that do not fit alone
    group = not_after - 1;
  }
  const Rows all = rows_of_group(walk, group_starts, group);
  // Within x for any starts: the number is the group's own at least, so this is not before row s − ⌊s / R⌋·R.
  const int64_t begin = all.begin + (number - first_chunk(walk, all, group)) * walk.chunk_rows;
  const int64_t end = begin + walk.chunk_rows < all.end ? begin + walk.chunk_rows : all.end;
  return {group, {begin, end}, all};
}

// ---- a thread's columns ----

struct Columns {
  int64_t first_channel;  // of the tile
  int32_t tile_channels;  // in this tile
  int32_t part;
  int32_t beside, above;  // the thread's place among `wide` and `high`
  int64_t channel;        // of the vector's first element
  int32_t position;       // of that in its plane, where planes are packed
  int64_t column;         // of that in the row
  int64_t byte;           // of the mask in the row; 0 where planes are packed
  int32_t left;           // elements from there to the end of what the vectors are cut from; none: the thread has no work
};

BNFUSE_DEVICE Columns columns_of_thread(const Walk& walk, int32_t tile) {
  Columns columns{};
  columns.beside = threadIdx.x % walk.wide;
  columns.above = threadIdx.x / walk.wide;
  columns.part = tile % walk.parts;
  columns.first_channel = int64_t(tile / walk.parts) * walk.tile_channels;
  const int64_t channels = walk.channels - columns.first_channel;
  columns.tile_channels = channels < walk.tile_channels ? int32_t(channels) : walk.tile_channels;
  if (walk.layout == Layout::planes) {
    const int64_t first = int64_t(columns.part) * walk.steps * walk.wide + columns.beside;  // vector of the tile's planes
    const int64_t plane = walk.tile_channels == 1 ? 0 : first / walk.run_vectors;
    const int64_t vector = first - plane * walk.run_vectors;
    columns.channel = columns.first_channel + plane;
    columns.column = columns.channel * walk.run + VECTOR * vector;
    columns.byte = columns.channel * walk.run_vectors + vector;
    columns.left = plane < columns.tile_channels ? int32_t(walk.run - VECTOR * vector) : 0;
  } else {
    const int64_t first = VECTOR * columns.beside;  // element of the tile
    columns.column = columns.first_channel * walk.run + first;
    columns.channel = columns.column / walk.run;
    columns.position = int32_t(columns.column - columns.channel * walk.run);
    columns.byte = walk.layout == Layout::packed ? 0 : columns.column / VECTOR;
    columns.left = int32_t(columns.tile_channels * walk.run - first);
  }
  return columns;
}

// The channel of the vector's element i.
template <Access ACCESS>
BNFUSE_DEVICE int64_t channel_of(const Walk& walk, const Columns& columns, int i) {
  if (ACCESS == Access::rows || walk.layout == Layout::rows) return columns.channel + i;
  if (walk.layout == Layout::planes) return columns.channel;
  return (columns.column + i) / walk.run;
}

// One value for each element of a vector, of that element's channel. Where all are of one channel it is kept once.
template <typename A, Access ACCESS>
struct PerChannel {
  A values[ACCESS == Access::planes ? 1 : VECTOR] = {};

  BNFUSE_DEVICE A operator[](int i) const { return values[ACCESS == Access::planes ? 0 : i]; }

  // from [C], or null: 0. Eight channels by two accesses: one by one, a block would ask its caches for them for microseconds.
  BNFUSE_DEVICE void load(const Walk& walk, const Columns& columns, const A* from) {
    if (!from) return;
    if constexpr (ACCESS == Access::rows) {
      if (reinterpret_cast<uintptr_t>(from + columns.channel) % 16 == 0) {
        if (columns.left > 0) widen(bnfuse::load<true>(from + columns.channel, VECTOR), values);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < int(sizeof(values) / sizeof(A)); ++i) {
      const int64_t channel = channel_of<ACCESS>(walk, columns, i);
      if (channel < walk.channels) values[i] = from[channel];
    }
  }

  template <typename Function>
  BNFUSE_DEVICE void transform(const Function& function) {
#pragma unroll
    for (int i = 0; i < int(sizeof(values) / sizeof(A)); ++i) values[i] = function(values[i]);
  }
};

// Goes through the vectors of a thread, row after row.
template <Access ACCESS>
struct Cursor {
  int64_t at;       // the vector's first element in x
  int64_t byte;     // of the mask; where planes are packed, of the row's first
  int32_t rows;     // of the thread
  int32_t vectors;  // of the thread in each of them
  int32_t step;     // the vector's place among these
  int32_t left;     // elements that are left of the row, of those that the vectors are cut from

  BNFUSE_DEVICE Cursor(const Walk& walk, const Columns& columns, Rows range) {
    const int64_t row = range.begin + columns.above;
    at = row * walk.row_elements() + columns.column;
    byte = row * walk.row_bytes + columns.byte;
    left = columns.left;
    step = 0;
    vectors = left > 0;
    if (!ONE_A_ROW<ACCESS> && walk.steps > 1 && left > 0) {
      const int32_t fitting = (left + VECTOR * walk.wide - 1) / (VECTOR * walk.wide);
      vectors = fitting < walk.steps ? fitting : walk.steps;
    }
    rows = columns.above < walk.high && row < range.end ? (int32_t(range.end - row) + walk.high - 1) / walk.high : 0;
  }

  // How often there is a vector here.
  BNFUSE_DEVICE int32_t total() const { return rows * vectors; }

  // Elements of the vector that are there.
  BNFUSE_DEVICE int count() const { return ACCESS == Access::elements && left < VECTOR ? left : VECTOR; }

  BNFUSE_DEVICE void advance(const Walk& walk) {
    if (!ONE_A_ROW<ACCESS> && step + 1 < vectors) {
      ++step;
      at += VECTOR * walk.wide;
      byte += walk.wide;
      left -= VECTOR * walk.wide;
    } else {
      const int32_t back = ONE_A_ROW<ACCESS> ? 0 : step * walk.wide;
      at += walk.high * walk.row_elements() - VECTOR * back;
      byte += walk.high * walk.row_bytes - back;
      left += VECTOR * back;
      step = 0;
    }
  }
};

// The most vectors that a thread of this block has in rows that are packed: all threads pass the same barriers.
BNFUSE_DEVICE int32_t most_vectors(const Walk& walk, Rows rows) {
  return (int32_t(rows.end - rows.begin) + walk.high - 1) / walk.high;
}

// What a kernel's registers must leave room for. The one for elements goes through rows and planes.
template <typename T, Access ACCESS, bool LEAN>
constexpr Places PLACES = places_of(ACCESS == Access::planes, sizeof(T) == 8,
                                    LEAN && (ACCESS == Access::rows || ACCESS == Access::planes));

// Vectors that a thread loads before it uses the first: 64 bytes of so many tensors together.
template <typename T, int TENSORS>
constexpr int VECTORS_IN_FLIGHT = 64 / (VECTOR * sizeof(T) * TENSORS) < 1 ? 1 : 64 / (VECTOR * sizeof(T) * TENSORS);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int MOST_IN_FLIGHT = 3;  // in planes: ptxas has no registers for a fourth
#else
constexpr int MOST_IN_FLIGHT = 4;
#endif

// ---- the mask of packed planes, whose bytes are not the vectors' ----

// Calls use(i, byte, position) for each element i of the vector: its byte in the mask's row, and its position in its plane.
template <typename Use>
BNFUSE_DEVICE void for_each_mask_bit(const Walk& walk, const Columns& columns, const Use& use) {
  int64_t byte = columns.channel * walk.run_vectors + columns.position / 8;
  int32_t position = columns.position;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    use(i, byte, position);
    ++position;
    const bool next_plane = position == walk.run;
    if (next_plane || position % 8 == 0) ++byte;  // a plane starts a byte
    if (next_plane) position = 0;
  }
}

}  // namespace
}  // namespace bnfuse
