// What a set of CPU kernels offers to the operators. One set is compiled for each instruction set; the kernels know
// nothing of tensors, threads or allocation, so these few types are all that crosses the border.
//
// Two walks over x [N, C, *spatial], L = product of the spatial sizes:
//   planes   contiguous x as [N·C, L]: a plane is one sample's channel, one after the other
//   columns  x as a table whose columns belong to channels: channels_last as [N·L, C], and contiguous x with tiny planes
//            as [N, C·L], so that the inner loops stay long
#pragma once

#include <cstdint>

#include "../bn_math.h"
#include "../elements.h"

namespace bnfuse {

// Rows [begin, end), all of one group: the unit of partial moments. A row of the walk over planes is a sample.
struct RowChunk {
  int64_t begin, end, group;
};

// How forward's walk over planes is cut into items: item i is channels tile i % channel_tiles of chunk i / channel_tiles. There
// is one tile of channels, or one sample a chunk, so that an item's planes follow each other in memory.
struct PlaneWalk {
  int64_t tile_channels;  // channels of an item at most
  int64_t channel_tiles;
  const RowChunk* chunks;
};

constexpr int64_t COLUMN_TILE = 2048;  // columns of an item at most

// The table, and how it is cut into items: item i is channels tile i % channel_tiles of chunk i / channel_tiles.
struct ColumnWalk {
  int64_t channels;       // C
  int64_t run;            // columns a channel: L where the table is [N, C·L], else 1
  int64_t fold;           // rows that count as one long row, a power of two; 1 where rows are long
  int64_t tile_channels;  // channels of an item at most; a multiple of 8 unless it is all or run > 1
  int64_t channel_tiles;
  const RowChunk* chunks;
};

// A is double where x is float64, else float.
struct Forward {
  DType dtype;
  Act act;
  double slope;
  int64_t channels, plane_size;  // C, L
  const void* x;                 // [N, C, *spatial]
  const void* residual;          // like x, or null
  const void* scale;             // A [C]
  const void* shift;             // A [C]
  void* y;                       // like x, or null: only the moments are wanted
  uint8_t* mask;                 // reference.pack_mask's layout, or null: no mask is needed
  double* partial_mean;          // [partials, C], one partial a chunk
  double* partial_m2;            // [partials, C], Σ(x − mean)²
};

struct Backward {
  DType dtype;
  Act act;
  double slope;
  int64_t channels, plane_size;  // C, L
  const void* dy;                // like x, or null: only the gradient through the moments is wanted
  const void* x;                 // [N, C, *spatial]
  const void* residual;          // like x, or null
  const uint8_t* mask;           // or null: act' comes from x and residual
  const void* scale;             // A [C]
  const void* shift;             // A [C]
  const void* mean;              // A [G, C]
  const void* dmean;             // A [G, C] or null
  const void* dvar;              // A [G, C] or null
  const int64_t* counts;         // [G], elements a channel in each group
  const int64_t* sample_groups;  // [N], planes only
  void* dx;                      // like x; may be dy
  void* dresidual;               // like x, or null
};

// Each function does the share [begin, end) of the walk's items, or (backward_planes) of the planes. Shares may run at the
// same time, and how the work is cut into shares changes no bit of the result.
struct Kernels {
  const char* instruction_set;
  void (*forward_planes)(const Forward&, const PlaneWalk&, int64_t begin, int64_t end);
  void (*forward_columns)(const Forward&, const ColumnWalk&, int64_t begin, int64_t end);
  void (*backward_planes)(const Backward&, int64_t begin, int64_t end);
  void (*backward_columns)(const Backward&, const ColumnWalk&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline;
#ifdef __x86_64__
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The set that runs on this processor; the environment variable BNFUSE_INSTRUCTION_SET (baseline, avx2, avx512) forces
// one. Throws std::runtime_error where the one asked for is unknown, not built or not supported. Decided once.
const Kernels& kernels();

}  // namespace bnfuse
