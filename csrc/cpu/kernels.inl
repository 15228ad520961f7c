// The CPU kernels, included once by each kernels_<instruction set>.cpp, which names the set and is compiled for it.
//
// Each kernel walks its share in *tiles* that fit the first-level cache, and runs a few plain loops over each tile: the
// moments, then the output. Memory is read once; the later loops find the tile in cache. The loops are written for the
// compiler to vectorise: a tile is [rows, width], and the inner loop runs over `width` without a branch.
//
//   planes  a tile is a piece of one plane: one row, one channel, whose coefficients are the same along the row
//   rows    a tile is some rows of up to TILE_WIDTH channels, and every column has its own coefficients. Where there
//           are few channels, `fold` consecutive rows count as one long row, so that the inner loop stays long.
//
// Everything sits in an unnamed namespace, and no header with code of its own is included: a function shared with
// another set might be the copy compiled for a processor that is not there.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../bn_math.h"
#include "kernels.h"

namespace bnfuse {
namespace {

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif

constexpr int64_t TILE_SIZE = 4096;   // elements of a tile at most; a multiple of 8, so that tiles share no mask byte
constexpr int64_t TILE_WIDTH = 256;   // channels of a tile at most, in the walk over rows; a multiple of 8
constexpr int64_t FOLDED_WIDTH = 64;  // narrower rows are folded until a row of the tile is at least this wide

// ---- element types: stored as T, computed as Accumulator<T> ----

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

BNFUSE_INLINE double widen(double value) { return value; }
BNFUSE_INLINE float widen(float value) { return value; }
BNFUSE_INLINE float widen(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

BNFUSE_INLINE float widen(Half value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;  // exponent and mantissa where float has them
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t infinite = magnitude + (224u << 23);              // inf and NaN
  // 2⁻¹⁴·(1 + mantissa) − 2⁻¹⁴: exact, and right too where subnormal floats are flushed to zero.
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  uint32_t bits = magnitude < (1u << 23) ? bit_cast<uint32_t>(subnormal) : normal;
  bits = magnitude >= (31u << 23) ? infinite : bits;
  return bit_cast<float>(bits | uint32_t(value.bits & 0x8000) << 16);
}

BNFUSE_INLINE void narrow(double value, double& stored) { stored = value; }
BNFUSE_INLINE void narrow(float value, float& stored) { stored = value; }

BNFUSE_INLINE void narrow(float value, BFloat16& stored) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  stored.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

BNFUSE_INLINE void narrow(float value, Half& stored) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding ½ lets the float unit round to a multiple of 2⁻²⁴, a half's smallest step.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  // Selected by bit masks: around conditional expressions the compiler builds branches, and then does not vectorise.
  const uint32_t is_small = 0u - uint32_t(magnitude < (113u << 23));
  const uint32_t is_large = 0u - uint32_t(magnitude >= (143u << 23));  // 2¹⁶ and above, inf, NaN
  const uint32_t is_nan = 0u - uint32_t(magnitude > 0x7f800000u);
  const uint32_t finite = (subnormal & is_small) | (normal & ~is_small);
  const uint32_t half = (finite & ~is_large) | (0x7c00u & is_large) | (0x0200u & is_nan);
  stored.bits = uint16_t(half | (bits & 0x80000000u) >> 16);
}

// ---- a tile ----

struct Shape {
  int64_t rows, width;
};

// Values computed for a tile, or x itself where it is stored as it is computed: row r starts at data + r·stride.
template <typename A>
struct Tile {
  const A* data;
  int64_t stride;
};

// `buffer` [TILE_SIZE] takes the values where they have to be converted.
template <typename T>
Tile<Accumulator<T>> load(const T* x, int64_t stride, Shape shape, Accumulator<T>* __restrict buffer) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return {x, stride};
  } else {
    for (int64_t r = 0; r < shape.rows; ++r)
      for (int64_t i = 0; i < shape.width; ++i) buffer[r * shape.width + i] = widen(x[r * stride + i]);
    return {buffer, shape.width};
  }
}

// The coefficients of a channel (planes), or of each column of a tile (rows).
template <typename A>
struct Columns {
  const A *scale, *shift, *mean, *dmean, *dvar;
};

// SAME: one coefficient for the whole row.
template <bool SAME, typename A>
BNFUSE_INLINE A column(const A* values, int64_t i) {
  return values[SAME ? 0 : i];
}

// ---- moments of a tile ----

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
};

template <typename A>
BNFUSE_INLINE typename VectorOf<A>::type load_vector(const A* x) {
  typename VectorOf<A>::type v;
  memcpy(&v, x, sizeof(v));
  return v;
}

// The sum of values [COUNT], a power of two, in pairs.
template <int64_t COUNT, typename A>
BNFUSE_INLINE A sum_pairwise(const A* values) {
  if constexpr (COUNT == 1) {
    return values[0];
  } else {
    return sum_pairwise<COUNT / 2>(values) + sum_pairwise<COUNT / 2>(values + COUNT / 2);
  }
}

template <typename A>
BNFUSE_INLINE A sum_lanes(typename VectorOf<A>::type v) {
  A lanes[VECTOR_BYTES / sizeof(A)];
  memcpy(lanes, &v, sizeof(v));
  return sum_pairwise<VECTOR_BYTES / sizeof(A)>(lanes);
}

// Merges x [n], n ≤ TILE_SIZE, all of one channel, into that channel's moments of `count` elements.
//
// First the mean of the piece, then first and second moments about it: what rounding took from the mean comes back
// through the first moment, and a mean far larger than the deviation does not cancel.
template <typename A>
void add_span(const A* x, int64_t n, double count, double& mean, double& m2) {
  using Vector = typename VectorOf<A>::type;
  constexpr int64_t LANES = VECTOR_BYTES / sizeof(A);

  Vector sum0{}, sum1{}, sum2{}, sum3{};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    sum0 += load_vector(x + i);
    sum1 += load_vector(x + i + LANES);
    sum2 += load_vector(x + i + 2 * LANES);
    sum3 += load_vector(x + i + 3 * LANES);
  }
  for (; i + LANES <= n; i += LANES) sum0 += load_vector(x + i);
  A sum = sum_lanes<A>((sum0 + sum1) + (sum2 + sum3));
  for (; i < n; ++i) sum += x[i];
  const A pivot = sum / A(n);

  Vector s0{}, s1{}, q0{}, q1{};
  for (i = 0; i + 2 * LANES <= n; i += 2 * LANES) {
    const Vector d0 = load_vector(x + i) - pivot;
    const Vector d1 = load_vector(x + i + LANES) - pivot;
    s0 += d0;
    s1 += d1;
    q0 += d0 * d0;
    q1 += d1 * d1;
  }
  for (; i + LANES <= n; i += LANES) {
    const Vector d = load_vector(x + i) - pivot;
    s0 += d;
    q0 += d * d;
  }
  A s = sum_lanes<A>(s0 + s1), q = sum_lanes<A>(q0 + q1);
  for (; i < n; ++i) {
    const A d = x[i] - pivot;
    s += d;
    q += d * d;
  }
  merge_moments(mean, m2, double(pivot) + double(s) / double(n), centred_m2(s, q, double(n)), merge_weights(count, n));
}

// values [fold·channels] → their sums over the folds in values [channels], halves onto halves; fold is a power of two.
template <typename A>
void sum_folds(A* __restrict values, int64_t fold, int64_t channels) {
  for (int64_t half = fold / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half * channels; ++i) values[i] += values[i + half * channels];
}

template <typename A>
void repeat_folds(A* __restrict values, int64_t fold, int64_t channels) {
  for (int64_t i = channels; i < fold * channels; ++i) values[i] = values[i - channels];
}

// As add_span for a tile of rows: column i belongs to channel i % channels, and each channel's moments so far are of
// `count` elements. The tile's width is fold·channels, or fewer rows of `channels` where one incomplete row is left over.
template <typename A>
void add_rows(Tile<A> x, Shape shape, int64_t fold, int64_t channels, double count, double* __restrict mean,
              double* __restrict m2) {
  A sum[TILE_WIDTH], s[TILE_WIDTH], q[TILE_WIDTH];
  const int64_t width = shape.width, columns = fold * channels;
  const double n = double(shape.rows * (width / channels));
  for (int64_t i = 0; i < columns; ++i) sum[i] = s[i] = q[i] = 0;

  int64_t r = 0;
  for (; r + 4 <= shape.rows; r += 4) {
    const A *x0 = x.data + r * x.stride, *x1 = x0 + x.stride, *x2 = x1 + x.stride, *x3 = x2 + x.stride;
    for (int64_t i = 0; i < width; ++i) sum[i] += (x0[i] + x1[i]) + (x2[i] + x3[i]);
  }
  for (; r < shape.rows; ++r)
    for (int64_t i = 0; i < width; ++i) sum[i] += x.data[r * x.stride + i];
  sum_folds(sum, fold, channels);
  for (int64_t c = 0; c < channels; ++c) sum[c] /= A(n);
  repeat_folds(sum, fold, channels);
  const A* pivot = sum;

  for (r = 0; r + 4 <= shape.rows; r += 4) {
    const A *x0 = x.data + r * x.stride, *x1 = x0 + x.stride, *x2 = x1 + x.stride, *x3 = x2 + x.stride;
    for (int64_t i = 0; i < width; ++i) {
      const A d0 = x0[i] - pivot[i], d1 = x1[i] - pivot[i], d2 = x2[i] - pivot[i], d3 = x3[i] - pivot[i];
      s[i] += (d0 + d1) + (d2 + d3);
      q[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < shape.rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const A d = x.data[r * x.stride + i] - pivot[i];
      s[i] += d;
      q[i] += d * d;
    }
  }
  sum_folds(s, fold, channels);
  sum_folds(q, fold, channels);

  const MergeWeights weights = merge_weights(count, n);
  for (int64_t c = 0; c < channels; ++c)
    merge_moments(mean[c], m2[c], double(pivot[c]) + double(s[c]) / n, centred_m2(s[c], q[c], n), weights);
}

// ---- the mask of a tile: one byte an element in cache, one bit an element in memory ----

// The bytes of a register are taken in order from the lowest, as memory has them on the processors torch runs on.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the mask is packed for little-endian processors");

BNFUSE_INLINE uint8_t pack_eight(uint64_t flags) { return uint8_t((flags * 0x0102040810204080u) >> 56); }

BNFUSE_INLINE uint64_t unpack_eight(uint8_t bits) {
  const uint64_t spread = (bits * 0x0101010101010101u) & 0x8040201008040201u;  // byte j keeps bit j
  return ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

// flags [n] of 0 and 1 → mask [⌈n/8⌉], the last byte padded with zeros.
void pack(const uint8_t* __restrict flags, int64_t n, uint8_t* __restrict mask) {
  const int64_t whole = n / 8 * 8;
  uint64_t eight = 0;
  for (int64_t i = 0; i < whole; i += 8) {
    memcpy(&eight, flags + i, 8);
    mask[i / 8] = pack_eight(eight);
  }
  if (n == whole) return;
  uint8_t last = 0;
  for (int64_t i = whole; i < n; ++i) last |= uint8_t(flags[i] << (i - whole));
  mask[whole / 8] = last;
}

// The inverse of pack.
void unpack(const uint8_t* __restrict mask, int64_t n, uint8_t* __restrict flags) {
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const uint64_t eight = unpack_eight(mask[i / 8]);
    memcpy(flags + i, &eight, 8);
  }
  for (int64_t i = whole; i < n; ++i) flags[i] = (mask[i / 8] >> (i - whole)) & 1;
}

// The mask of x's rows has `mask_stride` bytes a row of memory; a row of the tile is one or several of these, of
// `channels` elements each.
void pack_rows(const uint8_t* flags, Shape shape, int64_t channels, uint8_t* mask, int64_t mask_stride) {
  const int64_t memory_rows = shape.rows * (shape.width / channels);
  for (int64_t r = 0; r < memory_rows; ++r) pack(flags + r * channels, channels, mask + r * mask_stride);
}

void unpack_rows(const uint8_t* mask, int64_t mask_stride, Shape shape, int64_t channels, uint8_t* flags) {
  const int64_t memory_rows = shape.rows * (shape.width / channels);
  for (int64_t r = 0; r < memory_rows; ++r) unpack(mask + r * mask_stride, channels, flags + r * channels);
}

// ---- forward, a tile: y = act(scale·x + shift (+ residual)), and the flags of the mask ----

// residual, y: row r at r·stride. flags [rows·width], written where a mask is needed.
template <typename T>
using ApplyFunction = void (*)(Tile<Accumulator<T>> x, const T* residual, T* y, int64_t stride, Shape,
                               Columns<Accumulator<T>>, Accumulator<T> slope, uint8_t* flags);

template <typename T, Act ACT, bool RESIDUAL, bool SAME>
void apply(Tile<Accumulator<T>> x, const T* residual, T* y, int64_t stride, Shape shape,
           Columns<Accumulator<T>> columns, Accumulator<T> slope, uint8_t* flags) {
  using A = Accumulator<T>;
  constexpr bool MASK = RESIDUAL && (ACT == Act::relu || ACT == Act::relu6 || ACT == Act::leaky_relu);
  for (int64_t r = 0; r < shape.rows; ++r) {
    const A* __restrict x_row = x.data + r * x.stride;
    const T* __restrict residual_row = RESIDUAL ? residual + r * stride : nullptr;
    T* __restrict y_row = y + r * stride;
    uint8_t* __restrict flags_row = MASK ? flags + r * shape.width : nullptr;
    for (int64_t i = 0; i < shape.width; ++i) {
      A z = column<SAME>(columns.scale, i) * x_row[i] + column<SAME>(columns.shift, i);
      if (RESIDUAL) z += widen(residual_row[i]);
      if (MASK) flags_row[i] = on_upper_slope<ACT>(z);
      narrow(activation<ACT>(z, slope), y_row[i]);
    }
  }
}

template <typename T, bool RESIDUAL, bool SAME>
ApplyFunction<T> select_apply(Act act) {
  switch (act) {
    case Act::relu: return apply<T, Act::relu, RESIDUAL, SAME>;
    case Act::relu6: return apply<T, Act::relu6, RESIDUAL, SAME>;
    case Act::leaky_relu: return apply<T, Act::leaky_relu, RESIDUAL, SAME>;
    case Act::silu: return apply<T, Act::silu, RESIDUAL, SAME>;
    case Act::hardswish: return apply<T, Act::hardswish, RESIDUAL, SAME>;
    default: return apply<T, Act::identity, RESIDUAL, SAME>;
  }
}

// ---- backward, a tile, in two steps: dz = act'·dy, then dx = scale·dz + a + b·(x − mean) ----

// dz [rows·width], the gradient of the residual too.
template <typename T>
using DeriveFunction = void (*)(const T* dy, Tile<Accumulator<T>> x, const T* residual, int64_t stride, Shape,
                                Columns<Accumulator<T>>, Accumulator<T> slope, Accumulator<T>* dz);

template <typename T, Act ACT, bool RESIDUAL, bool SAME>
void derive(const T* dy, Tile<Accumulator<T>> x, const T* residual, int64_t stride, Shape shape,
            Columns<Accumulator<T>> columns, Accumulator<T> slope, Accumulator<T>* dz) {
  using A = Accumulator<T>;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const A* __restrict x_row = x.data + r * x.stride;
    const T* __restrict residual_row = RESIDUAL ? residual + r * stride : nullptr;
    const T* __restrict dy_row = dy + r * stride;
    A* __restrict dz_row = dz + r * shape.width;
    for (int64_t i = 0; i < shape.width; ++i) {
      A z = column<SAME>(columns.scale, i) * x_row[i] + column<SAME>(columns.shift, i);
      if (RESIDUAL) z += widen(residual_row[i]);
      dz_row[i] = derivative<ACT>(z, slope) * widen(dy_row[i]);
    }
  }
}

template <typename T, bool RESIDUAL, bool SAME>
DeriveFunction<T> select_derive(Act act) {
  switch (act) {
    case Act::relu: return derive<T, Act::relu, RESIDUAL, SAME>;
    case Act::relu6: return derive<T, Act::relu6, RESIDUAL, SAME>;
    case Act::leaky_relu: return derive<T, Act::leaky_relu, RESIDUAL, SAME>;
    case Act::silu: return derive<T, Act::silu, RESIDUAL, SAME>;
    case Act::hardswish: return derive<T, Act::hardswish, RESIDUAL, SAME>;
    default: return derive<T, Act::identity, false, SAME>;
  }
}

template <typename T>
void derive_from_flags(const T* dy, int64_t stride, Shape shape, const uint8_t* flags, Accumulator<T> below,
                       Accumulator<T>* dz) {
  using A = Accumulator<T>;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const T* __restrict dy_row = dy + r * stride;
    const uint8_t* __restrict flags_row = flags + r * shape.width;
    A* __restrict dz_row = dz + r * shape.width;
    for (int64_t i = 0; i < shape.width; ++i) dz_row[i] = (flags_row[i] ? A(1) : below) * widen(dy_row[i]);
  }
}

template <typename T>
void store(const Accumulator<T>* values, T* out, int64_t stride, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t i = 0; i < shape.width; ++i) narrow(values[r * shape.width + i], out[r * stride + i]);
}

// An absent dvar must not touch x: 0·inf would be NaN.
template <typename T, bool DY, bool DVAR, bool SAME>
void combine(const Accumulator<T>* dz, Tile<Accumulator<T>> x, Shape shape, Columns<Accumulator<T>> columns, T* dx,
             int64_t stride) {
  using A = Accumulator<T>;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const A* __restrict x_row = x.data + r * x.stride;
    const A* __restrict dz_row = DY ? dz + r * shape.width : nullptr;
    T* __restrict dx_row = dx + r * stride;
    for (int64_t i = 0; i < shape.width; ++i) {
      A sum = column<SAME>(columns.dmean, i);
      if (DVAR) sum += column<SAME>(columns.dvar, i) * (x_row[i] - column<SAME>(columns.mean, i));
      if (DY) sum += column<SAME>(columns.scale, i) * dz_row[i];
      narrow(sum, dx_row[i]);
    }
  }
}

// Everything that a tile's backward needs besides its pointers; chosen once for each share of the work.
template <typename T, bool SAME>
struct BackwardTile {
  using A = Accumulator<T>;
  const Backward& f;
  DeriveFunction<T> derive;
  alignas(64) A x_buffer[TILE_SIZE];
  alignas(64) A dz[TILE_SIZE];
  uint8_t flags[TILE_SIZE];

  explicit BackwardTile(const Backward& f)
      : f(f), derive(f.residual ? select_derive<T, true, SAME>(f.act) : select_derive<T, false, SAME>(f.act)) {}

  // The tile at element `at` of x, whose rows lie `stride` apart; its mask rows hold `channels` elements, `mask_stride`
  // bytes apart.
  void operator()(int64_t at, int64_t stride, Shape shape, Columns<A> columns, const uint8_t* mask, int64_t mask_stride,
                  int64_t channels) {
    const Tile<A> x = load(static_cast<const T*>(f.x) + at, stride, shape, x_buffer);
    T* dx = static_cast<T*>(f.dx) + at;
    if (f.dy) {
      const T* dy = static_cast<const T*>(f.dy) + at;
      if (f.mask) {
        unpack_rows(mask, mask_stride, shape, channels, flags);
        derive_from_flags(dy, stride, shape, flags, A(lower_slope(f.act, f.slope)), dz);
      } else {
        const T* residual = f.residual ? static_cast<const T*>(f.residual) + at : nullptr;
        derive(dy, x, residual, stride, shape, columns, A(f.slope), dz);
      }
    } else if (f.dresidual) {
      memset(dz, 0, sizeof(dz));
    }
    if (f.dresidual) store(dz, static_cast<T*>(f.dresidual) + at, stride, shape);
    const auto combine_tile = f.dy ? (f.dvar ? combine<T, true, true, SAME> : combine<T, true, false, SAME>)
                                   : (f.dvar ? combine<T, false, true, SAME> : combine<T, false, false, SAME>);
    combine_tile(dz, x, shape, columns, dx, stride);
  }
};

// ---- the walk over planes: [begin, end) of the N·C planes [L] ----

int64_t mask_bytes(int64_t row_length) { return (row_length + 7) / 8; }

template <typename T>
void forward_planes_of(const Forward& f, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  alignas(64) A buffer[TILE_SIZE];
  uint8_t flags[TILE_SIZE];
  const auto apply_tile = f.residual ? select_apply<T, true, true>(f.act) : select_apply<T, false, true>(f.act);

  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t c = plane % f.channels;
    const Columns<A> columns{static_cast<const A*>(f.scale) + c, static_cast<const A*>(f.shift) + c, nullptr, nullptr,
                             nullptr};
    double mean = 0, m2 = 0;
    for (int64_t i = 0; i < f.plane_size; i += TILE_SIZE) {
      const int64_t at = plane * f.plane_size + i;
      const Shape shape{1, f.plane_size - i < TILE_SIZE ? f.plane_size - i : TILE_SIZE};
      const Tile<A> x = load(static_cast<const T*>(f.x) + at, shape.width, shape, buffer);
      add_span(x.data, shape.width, double(i), mean, m2);
      if (!f.y) continue;
      const T* residual = f.residual ? static_cast<const T*>(f.residual) + at : nullptr;
      apply_tile(x, residual, static_cast<T*>(f.y) + at, shape.width, shape, columns, A(f.slope), flags);
      if (f.mask) pack(flags, shape.width, f.mask + plane * mask_bytes(f.plane_size) + i / 8);
    }
    f.partial_mean[plane] = mean;
    f.partial_m2[plane] = m2;
  }
}

template <typename T>
void backward_planes_of(const Backward& f, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  BackwardTile<T, true> backward_tile(f);
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t c = plane % f.channels, group = f.sample_groups[plane / f.channels];
    const int64_t g_c = group * f.channels + c;
    const A count = A(f.counts[group]);
    const A a = f.dmean ? mean_coefficient(static_cast<const A*>(f.dmean)[g_c], count) : A(0);
    const A b = f.dvar ? var_coefficient(static_cast<const A*>(f.dvar)[g_c], count) : A(0);
    const Columns<A> columns{static_cast<const A*>(f.scale) + c, static_cast<const A*>(f.shift) + c,
                             static_cast<const A*>(f.mean) + g_c, &a, &b};
    for (int64_t i = 0; i < f.plane_size; i += TILE_SIZE) {
      const Shape shape{1, f.plane_size - i < TILE_SIZE ? f.plane_size - i : TILE_SIZE};
      const uint8_t* mask = f.mask ? f.mask + plane * mask_bytes(f.plane_size) + i / 8 : nullptr;
      backward_tile(plane * f.plane_size + i, shape.width, shape, columns, mask, 0, shape.width);
    }
  }
}

// ---- the walk over rows: chunks [begin, end) of rows [C] ----

// How rows of C channels are cut into tiles.
struct Tiling {
  int64_t channels;  // C
  int64_t fold;      // rows of memory in a row of the tile: a power of two; 1 where C ≥ FOLDED_WIDTH

  explicit Tiling(int64_t channels) : channels(channels), fold(1) {
    while (fold * channels < FOLDED_WIDTH) fold *= 2;
  }

  // Calls tile(first row, stride, shape) for all tiles of channels [c, c + columns) in rows [begin, end): whole rows of
  // the tile, and at the end one row with the rows of memory that are left over.
  template <typename Function>
  BNFUSE_INLINE void for_each(int64_t begin, int64_t end, int64_t columns, const Function& tile) const {
    const int64_t width = fold * columns, step = TILE_SIZE / width * fold;
    for (int64_t row = begin; row < end; row += step) {
      const int64_t rows = end - row < step ? end - row : step;
      const int64_t whole = rows / fold, rest = rows % fold;
      if (whole) tile(row, fold * channels, Shape{whole, width});
      if (rest) tile(row + whole * fold, fold * channels, Shape{1, rest * columns});
    }
  }
};

// values [channels] and its copies for the folds.
template <typename A>
struct ColumnBuffer {
  alignas(64) A values[TILE_WIDTH];

  template <typename Function>
  BNFUSE_INLINE void fill(int64_t fold, int64_t channels, const Function& value) {
    for (int64_t c = 0; c < channels; ++c) values[c] = value(c);
    repeat_folds(values, fold, channels);
  }
};

template <typename T>
void forward_rows_of(const Forward& f, const RowChunk* chunks, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  alignas(64) A buffer[TILE_SIZE];
  uint8_t flags[TILE_SIZE];
  ColumnBuffer<A> scale, shift;
  const Columns<A> columns{scale.values, shift.values, nullptr, nullptr, nullptr};
  const auto apply_tile = f.residual ? select_apply<T, true, false>(f.act) : select_apply<T, false, false>(f.act);
  const Tiling tiling(f.channels);
  const int64_t mask_stride = mask_bytes(f.channels);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for (int64_t first = 0; first < f.channels; first += TILE_WIDTH) {
      const int64_t channels = f.channels - first < TILE_WIDTH ? f.channels - first : TILE_WIDTH;
      if (f.y) {
        scale.fill(tiling.fold, channels, [&](int64_t c) { return static_cast<const A*>(f.scale)[first + c]; });
        shift.fill(tiling.fold, channels, [&](int64_t c) { return static_cast<const A*>(f.shift)[first + c]; });
      }
      double* mean = f.partial_mean + chunk * f.channels + first;
      double* m2 = f.partial_m2 + chunk * f.channels + first;
      for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;

      tiling.for_each(chunks[chunk].begin, chunks[chunk].end, channels, [&](int64_t row, int64_t stride, Shape shape) {
        const int64_t at = row * f.channels + first;
        const Tile<A> x = load(static_cast<const T*>(f.x) + at, stride, shape, buffer);
        add_rows(x, shape, tiling.fold, channels, double(row - chunks[chunk].begin), mean, m2);
        if (!f.y) return;
        const T* residual = f.residual ? static_cast<const T*>(f.residual) + at : nullptr;
        apply_tile(x, residual, static_cast<T*>(f.y) + at, stride, shape, columns, A(f.slope), flags);
        if (f.mask) pack_rows(flags, shape, channels, f.mask + row * mask_stride + first / 8, mask_stride);
      });
    }
  }
}

template <typename T>
void backward_rows_of(const Backward& f, const RowChunk* chunks, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  BackwardTile<T, false> backward_tile(f);
  ColumnBuffer<A> scale, shift, mean, a, b;
  const Columns<A> columns{scale.values, shift.values, mean.values, a.values, b.values};
  const Tiling tiling(f.channels);
  const int64_t mask_stride = mask_bytes(f.channels);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t group = chunks[chunk].group;
    const A count = A(f.counts[group]);
    for (int64_t first = 0; first < f.channels; first += TILE_WIDTH) {
      const int64_t channels = f.channels - first < TILE_WIDTH ? f.channels - first : TILE_WIDTH;
      const int64_t g_c = group * f.channels + first;
      if (f.dy) {
        scale.fill(tiling.fold, channels, [&](int64_t c) { return static_cast<const A*>(f.scale)[first + c]; });
        shift.fill(tiling.fold, channels, [&](int64_t c) { return static_cast<const A*>(f.shift)[first + c]; });
      }
      mean.fill(tiling.fold, channels, [&](int64_t c) { return static_cast<const A*>(f.mean)[g_c + c]; });
      a.fill(tiling.fold, channels, [&](int64_t c) {
        return f.dmean ? mean_coefficient(static_cast<const A*>(f.dmean)[g_c + c], count) : A(0);
      });
      b.fill(tiling.fold, channels, [&](int64_t c) {
        return f.dvar ? var_coefficient(static_cast<const A*>(f.dvar)[g_c + c], count) : A(0);
      });
      tiling.for_each(chunks[chunk].begin, chunks[chunk].end, channels, [&](int64_t row, int64_t stride, Shape shape) {
        const uint8_t* mask = f.mask ? f.mask + row * mask_stride + first / 8 : nullptr;
        backward_tile(row * f.channels + first, stride, shape, columns, mask, mask_stride, channels);
      });
    }
  }
}

// ---- by dtype ----

void forward_planes(const Forward& f, int64_t begin, int64_t end) {
  switch (f.dtype) {
    case DType::float32: return forward_planes_of<float>(f, begin, end);
    case DType::float64: return forward_planes_of<double>(f, begin, end);
    case DType::bfloat16: return forward_planes_of<BFloat16>(f, begin, end);
    case DType::float16: return forward_planes_of<Half>(f, begin, end);
  }
}

void forward_rows(const Forward& f, const RowChunk* chunks, int64_t begin, int64_t end) {
  switch (f.dtype) {
    case DType::float32: return forward_rows_of<float>(f, chunks, begin, end);
    case DType::float64: return forward_rows_of<double>(f, chunks, begin, end);
    case DType::bfloat16: return forward_rows_of<BFloat16>(f, chunks, begin, end);
    case DType::float16: return forward_rows_of<Half>(f, chunks, begin, end);
  }
}

void backward_planes(const Backward& f, int64_t begin, int64_t end) {
  switch (f.dtype) {
    case DType::float32: return backward_planes_of<float>(f, begin, end);
    case DType::float64: return backward_planes_of<double>(f, begin, end);
    case DType::bfloat16: return backward_planes_of<BFloat16>(f, begin, end);
    case DType::float16: return backward_planes_of<Half>(f, begin, end);
  }
}

void backward_rows(const Backward& f, const RowChunk* chunks, int64_t begin, int64_t end) {
  switch (f.dtype) {
    case DType::float32: return backward_rows_of<float>(f, chunks, begin, end);
    case DType::float64: return backward_rows_of<double>(f, chunks, begin, end);
    case DType::bfloat16: return backward_rows_of<BFloat16>(f, chunks, begin, end);
    case DType::float16: return backward_rows_of<Half>(f, chunks, begin, end);
  }
}

}  // namespace

const Kernels BNFUSE_KERNELS = {BNFUSE_INSTRUCTION_SET, forward_planes, forward_rows, backward_planes, backward_rows};

}  // namespace bnfuse
