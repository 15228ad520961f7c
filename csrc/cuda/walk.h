// How x [N, C, *spatial] is cut into blocks of a CUDA grid. Decided on the host from shapes and addresses alone; the groups'
// starts stay on the device, where each block finds its own rows.
//
// x is a table: a row is a position's C channels (channels_last), or a sample's planes one after the other, C·L elements.
// A *vector* is eight consecutive elements of a row. A block takes a *tile* of the columns and a *chunk* of the rows, all of
// one group; its threads stand side by side over the vectors of the tile, and in several rows where the tile is narrow. Each
// thread stays in its columns, so what belongs to their channels stays in its registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../bn_math.h"

namespace bnfuse {

enum class Layout : int32_t {
  rows,    // a vector is eight channels of one position, or what is left of C
  planes,  // a vector is eight elements of one plane, or what is left of L
  packed,  // a vector is eight elements of a sample, across the planes' borders: small planes with L not a multiple of 8
};

// Threads of a block, and blocks that a multiprocessor holds at a time: the kernels' registers must leave room for them. Most
// walks have no more blocks than all multiprocessors hold: what a block does before its first load and after its last takes
// some microseconds, and each leaves a partial moment a channel behind.
struct Places {
  int threads, resident;
};

// Of kernels for planes, of one channel each; of float64, which is not there to be fast; of those that need few registers.
constexpr Places places_of(bool planes, bool doubles, bool lean) {
  return doubles ? Places{256, 1} : planes ? Places{256, lean ? 3 : 2} : Places{lean ? 640 : 512, 1};
}

constexpr int64_t MOST_TURNS = 8;  // of a multiprocessor's places, that are tried
constexpr int64_t TILE_VECTORS = 32;  // at most, of channels_last rows: 512 bytes of 16-bit elements
constexpr int64_t MOST_STEPS = 512;  // of a thread in its chunk: so many values enter one moment in float32
constexpr int64_t PARTIAL_ELEMENTS = 64;  // that one partial moment stands for at least, where there is enough of x

struct Walk {
  Layout layout;
  bool aligned;           // every vector is whole, and starts at a multiple of 16 bytes
  int32_t groups;         // G
  int64_t channels;       // C
  int64_t rows;           // N·L, or N
  int64_t rows_a_sample;  // L, or 1
  int64_t run;            // elements a channel in a row: 1, or L
  int64_t run_vectors;    // planes: vectors a channel in a row
  int64_t row_bytes;      // of the mask, a row
  int32_t tile_channels;  // at most
  int32_t parts;          // tiles that share one channel, where a plane is large and there are few
  int32_t tiles;
  int32_t wide, high;     // threads of a block: vectors side by side, rows side by side
  int32_t steps;          // vectors of a row that one thread takes, `wide` apart: more than one in large planes alone
  int64_t chunk_rows;     // at most
  int64_t chunks;         // of all groups, at most: some of the numbers belong to no chunk
  int32_t team;           // threads that combine a channel's moments in a block, a power of two

  BNFUSE_INLINE int64_t row_elements() const { return channels * run; }
  int64_t blocks() const { return chunks * tiles; }
  int threads() const { return (wide * high + 31) / 32 * 32; }
  // Partial moments lie as [chunks, C, parts].
  int64_t partials() const { return chunks * channels * parts; }
};

namespace walks {

constexpr int64_t PLANES_THREADS = places_of(true, false, false).threads;
constexpr int64_t PACKED_THREADS = places_of(false, false, false).threads;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void cut_rows(Walk& walk, bool aligned_memory) {
  const int64_t vectors = divide_up(walk.channels, 8);
  walk.layout = Layout::rows;
  walk.aligned = aligned_memory && walk.channels % 8 == 0;
  walk.wide = divide_up(vectors, divide_up(vectors, TILE_VECTORS));
  walk.tile_channels = 8 * walk.wide;
  walk.row_bytes = vectors;
}

// Channels of a tile: as many as its threads can take, but no more than leaves every multiprocessor two blocks.
inline int64_t planes_a_tile(const Walk& walk, int64_t most, int64_t multiprocessors) {
  return std::clamp<int64_t>(walk.channels * walk.rows / (2 * multiprocessors), 1, std::min(most, walk.channels));
}

inline void cut_planes(Walk& walk, bool aligned_memory, int64_t multiprocessors) {
  walk.run_vectors = divide_up(walk.run, 8);
  walk.row_bytes = walk.channels * walk.run_vectors;
  const int64_t unit = 8 / std::gcd<int64_t>(walk.run, 8);  // planes that make whole vectors together
  if (aligned_memory && unit > 1 && walk.channels % unit == 0 && unit * walk.run <= 8 * PACKED_THREADS) {
    walk.layout = Layout::packed;
    walk.aligned = true;
    const int64_t units = planes_a_tile(walk, 8 * PACKED_THREADS / walk.run, multiprocessors) / unit;
    walk.tile_channels = unit * std::max<int64_t>(1, units);
    walk.wide = walk.tile_channels * walk.run / 8;
    return;
  }
  walk.layout = Layout::planes;
  walk.aligned = aligned_memory && unit == 1;
  if (walk.run_vectors <= PLANES_THREADS) {
    walk.tile_channels = planes_a_tile(walk, PLANES_THREADS / walk.run_vectors, multiprocessors);
    walk.wide = walk.tile_channels * walk.run_vectors;
    return;
  }
  walk.tile_channels = 1;
  const int64_t steps = divide_up(walk.run_vectors, PLANES_THREADS);
  walk.wide = divide_up(walk.run_vectors, steps);
  const int64_t wanted = std::max(divide_up(2 * multiprocessors, walk.channels * walk.rows), divide_up(steps, MOST_STEPS));
  const int64_t parts = std::min(wanted, steps);
  walk.steps = divide_up(steps, parts);
  walk.parts = divide_up(walk.run_vectors, int64_t(walk.steps) * walk.wide);
}

}  // namespace walks

// x is not empty. `aligned_memory`: x and all that is like x start at a multiple of 16 bytes, and eight elements are whole
// 16-byte words that the kernels may load at once. `doubles`: x is float64. `lean`: see places_of.
inline Walk make_walk(int64_t samples, int64_t channels, int64_t plane_size, bool planes, int64_t groups, bool aligned_memory,
                      bool doubles, bool lean, int64_t multiprocessors) {
  using walks::divide_up;
  Walk walk{};
  walk.groups = static_cast<int32_t>(groups);
  walk.channels = channels;
  walk.rows = planes ? samples : samples * plane_size;
  walk.rows_a_sample = planes ? 1 : plane_size;
  walk.run = planes ? plane_size : 1;
  walk.parts = walk.steps = 1;
  if (planes) walks::cut_planes(walk, aligned_memory, multiprocessors);
  else walks::cut_rows(walk, aligned_memory);
  const bool lean_kernel = lean && walk.aligned && walk.layout != Layout::packed;
  const Places places = places_of(walk.layout == Layout::planes, doubles, lean_kernel);
  walk.tiles = static_cast<int32_t>(divide_up(channels, walk.tile_channels) * walk.parts);
  walk.high = walk.steps == 1 ? static_cast<int32_t>(std::clamp<int64_t>(walk.rows, 1, places.threads / walk.wide)) : 1;

  // As many chunks as the multiprocessors can hold the blocks of at a time; twice that, and so on, where a thread would have
  // too many steps, or many multiprocessors would be idle. Each group ends with a chunk that is not full: where groups are few
  // these are among the blocks reckoned with, where they are many blocks are shorter and take their turns.
  const int64_t resident = places.resident * multiprocessors;
  const int64_t most_rows = std::max<int64_t>(1, MOST_STEPS / walk.steps) * walk.high;  // of a chunk
  const int64_t first_turn = divide_up(walk.rows * walk.tiles, resident * most_rows);
  int64_t held = 1;
  for (int64_t turns = first_turn; turns < first_turn + MOST_TURNS; ++turns) {
    held = std::max<int64_t>(1, turns * resident / walk.tiles);
    if (10 * held * walk.tiles >= 9 * turns * resident) break;
  }
  const int64_t wanted = groups == 1 ? held : 2 * groups <= held ? held - groups : 2 * held;
  const int64_t least = std::min(divide_up(PARTIAL_ELEMENTS, walk.run), divide_up(walk.rows * walk.tiles, 2 * multiprocessors));
  const int64_t rows = std::max({divide_up(walk.rows, wanted), least, int64_t(1)});
  walk.chunk_rows = std::min(divide_up(rows, walk.high) * walk.high, most_rows);
  // Chunk k of the group that starts at row s has the number s / chunk_rows + g + k: see first_chunk.
  walk.chunks = groups == 1 ? divide_up(walk.rows, walk.chunk_rows) : walk.rows / walk.chunk_rows + groups;

  const int64_t entries = walk.high * (walk.layout == Layout::packed ? walk.run : walk.layout == Layout::rows ? 1
                                       : walk.tile_channels == 1 ? int64_t(walk.wide) : walk.run_vectors);
  walk.team = 1;
  while (walk.team < 32 && walk.team < entries && 2 * walk.team * walk.tile_channels <= walk.threads()) walk.team *= 2;
  return walk;
}

}  // namespace bnfuse
