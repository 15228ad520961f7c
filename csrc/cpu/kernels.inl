// The CPU kernels, included once by each kernels_<instruction set>.cpp, which names the set and is compiled for it.
//
// Each kernel walks its share in *tiles* that fit the first-level cache, and runs a few plain loops over each tile: where it is
// not known yet, one for what the moments are taken about, then one for moments and output. Memory is read once; later loops
// find the tile in cache. The loops are in vectors, or written for the compiler to make them so: a tile is [rows, width],
// and the inner loop runs over `width` without a branch. All arithmetic is in the accumulator's type A: bfloat16 is
// converted as it is loaded and stored, float16 tile by tile.
//
//   planes   a tile is a piece of one plane or some planes, as they follow in memory: each row has one channel, and one
//            coefficient
//   columns  a tile is some rows of some columns, and every column has its own coefficients
//
// Everything sits in an unnamed namespace, and no header with code of its own is included but for the compiler's
// intrinsics: a function shared with another set might be the copy compiled for a processor that is not there.
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../bn_math.h"
#include "../elements.h"
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

constexpr int64_t TILE_SIZE = 8192;      // elements of a tile at most
constexpr int64_t APART = 96;            // elements between buffers, which would share lines of the first-level cache if they lay
                                         // a power of two apart: half the speed, wherever the stack happens to be so
constexpr int64_t BACKWARD_TILE = 4096;  // of a tile in the walk over planes; a multiple of 8: tiles share no mask byte
constexpr int64_t FORWARD_TILE = 1024;   // the same, where reading and writing take turns: so often that neither has to wait
constexpr int64_t PIVOT_ROWS = 4;        // of an item, whose mean its moments are taken about
constexpr int64_t SETTLED_ROWS = 64;     // are summed one after the other, before their sum joins others: squares of few kinds,
                                         // as pixels have, may lean when they are added to a sum hundreds of times their size

// ---- spans of elements ----

// values [n] of T as A, and back.
template <typename T, typename A>
void widen_span(const T* __restrict in, int64_t n, A* __restrict out) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= n; i += 8) {
      __m128i halves;
      memcpy(&halves, in + i, sizeof(halves));
      const __m256 floats = _mm256_cvtph_ps(halves);
      memcpy(out + i, &floats, sizeof(floats));
    }
  }
#endif
  for (; i < n; ++i) out[i] = widen(in[i]);
}

template <typename T, typename A>
void narrow_span(const A* __restrict in, int64_t n, T* __restrict out) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= n; i += 8) {
      __m256 floats;
      memcpy(&floats, in + i, sizeof(floats));
      const __m128i halves = _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT);
      memcpy(out + i, &halves, sizeof(halves));
    }
  }
#endif
  for (; i < n; ++i) narrow(in[i], out[i]);
}

// ---- a tile ----

struct Shape {
  int64_t rows, width;
};

// As one long row, where rows `stride` apart follow each other without a gap.
BNFUSE_INLINE Shape without_gaps(Shape shape, int64_t stride) {
  return stride == shape.width ? Shape{1, shape.rows * shape.width} : shape;
}

// Elements of a tile: row r starts at data + r·stride.
template <typename E>
struct Tile {
  E* data;
  int64_t stride;
};

// What the loops over a tile read and write, E: elements as they are stored, or the accumulators of those that compilers do not
// convert in vectors.
template <typename T>
using Element = std::conditional_t<std::is_same_v<T, Half>, Accumulator<T>, T>;

// Rows that lie far apart are each in a page of their own. At its start the processor waits for memory, since its prefetching
// ended with the page before: so all rows of a tile are asked for before the first is used, and several are taken at a time.
// So are wide rows, whose coefficients and sums leave no room in the first-level cache: rows taken together share them.
constexpr int64_t FAR_APART = 4096;  // bytes
constexpr int64_t ASKED_FOR = 256;   // bytes of each row; the processor's own prefetching goes on from there
constexpr int64_t WIDE = 1024;       // columns
constexpr int ROWS_AT_ONCE = 4;

template <typename T>
BNFUSE_INLINE bool far_apart(int64_t stride, Shape shape) {
  return stride > shape.width && stride * int64_t(sizeof(T)) >= FAR_APART;
}

template <typename T>
BNFUSE_INLINE bool several_at_once(int64_t stride, Shape shape) {
  return shape.width >= WIDE || far_apart<T>(stride, shape);
}

template <typename T>
BNFUSE_INLINE void ask_for(const T* x, int64_t stride, Shape shape) {
  if (!far_apart<T>(stride, shape)) return;
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t byte = 0; byte < ASKED_FOR; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + r * stride) + byte);
}

// A tile of memory: itself, or converted into `buffer` [TILE_SIZE].
template <typename T>
Tile<const Element<T>> load(const T* x, int64_t stride, Shape shape, Accumulator<T>* __restrict buffer) {
  ask_for(x, stride, shape);
  if constexpr (std::is_same_v<T, Element<T>>) {
    return {x, stride};
  } else {
    const Shape spans = without_gaps(shape, stride);
    for (int64_t r = 0; r < spans.rows; ++r) widen_span(x + r * stride, spans.width, buffer + r * spans.width);
    return {buffer, shape.width};
  }
}

// Where the values of a tile of output are computed: in memory, or in `buffer` [TILE_SIZE] from which `store` takes them.
template <typename T>
Tile<Element<T>> target(T* out, int64_t stride, Shape shape, Accumulator<T>* buffer) {
  ask_for(out, stride, shape);
  if constexpr (std::is_same_v<T, Element<T>>) {
    return {out, stride};
  } else {
    return {buffer, shape.width};
  }
}

template <typename E, typename T>
void store(Tile<E> values, T* out, int64_t stride, Shape shape) {
  if (reinterpret_cast<void*>(values.data) == reinterpret_cast<void*>(out)) return;
  if (values.stride == shape.width) shape = without_gaps(shape, stride);
  for (int64_t r = 0; r < shape.rows; ++r) {
    if constexpr (std::is_same_v<T, E>) {
      memcpy(out + r * stride, values.data + r * values.stride, shape.width * sizeof(T));
    } else {
      narrow_span(values.data + r * values.stride, shape.width, out + r * stride);
    }
  }
}

// Calls use(row, number of rows) for all rows: for several where `at_once`, else, and for those left over, for each.
template <typename Use>
BNFUSE_INLINE void for_rows(int64_t rows, bool at_once, const Use& use) {
  int64_t r = 0;
  if (at_once)
    for (; r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE) use(r, std::integral_constant<int, ROWS_AT_ONCE>());
  for (; r < rows; ++r) use(r, std::integral_constant<int, 1>());
}

// The coefficients of each row of a tile (planes), or of each of its columns.
template <typename A>
struct Coefficients {
  const A *scale, *shift, *mean, *dmean, *dvar;
};

// SAME: one coefficient for the whole row r; otherwise one for each column i.
template <bool SAME, typename A>
BNFUSE_INLINE A of(const A* values, int64_t r, int64_t i) {
  return values[SAME ? r : i];
}

// ---- vectors ----

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Bits = int32_t;
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef Bits bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES / sizeof(Bits))));
};
template <>
struct VectorOf<double> {
  using Bits = int64_t;
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef Bits bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES / sizeof(Bits))));
};

template <typename A>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(A);

template <typename A>
BNFUSE_INLINE typename VectorOf<A>::type load_vector(const A* x) {
  typename VectorOf<A>::type v;
  memcpy(&v, x, sizeof(v));
  return v;
}

// bfloat16 as the upper half of a float.
typedef uint32_t FloatBits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t BFloat16Bits __attribute__((vector_size(VECTOR_BYTES / 2)));

BNFUSE_INLINE VectorOf<float>::type load_vector(const BFloat16* x) {
  BFloat16Bits stored;
  memcpy(&stored, x, sizeof(stored));
#ifdef __AVX512F__  // where compilers convert each half alone
  const FloatBits wide = (FloatBits)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)stored);
#else
  const FloatBits wide = __builtin_convertvector(stored, FloatBits);
#endif
  return (VectorOf<float>::type)(wide << 16);
}

template <typename A>
BNFUSE_INLINE void store_vector(typename VectorOf<A>::type v, A* x) {
  memcpy(x, &v, sizeof(v));
}

// As narrow does it.
BNFUSE_INLINE void store_vector(VectorOf<float>::type v, BFloat16* x) {
  const FloatBits bits = (FloatBits)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatBits is_nan = (FloatBits)((bits & 0x7fffffffu) > 0x7f800000u);
  const FloatBits narrowed = (rounded & ~is_nan) | (0x7fc0u & is_nan);
  const BFloat16Bits stored = __builtin_convertvector(narrowed, BFloat16Bits);
  memcpy(x, &stored, sizeof(stored));
}

// of<SAME> for LANES columns from i on.
template <bool SAME, typename A>
BNFUSE_INLINE typename VectorOf<A>::type vector_of(const A* values, int64_t r, int64_t i) {
  return SAME ? values[r] - typename VectorOf<A>::type{} : load_vector(values + i);
}

// Lanes that are 0 or not, as bytes of 0 and 1, and back.
template <typename A>
BNFUSE_INLINE void store_flags(typename VectorOf<A>::bits lanes, uint8_t* flags) {
  const auto bytes = __builtin_convertvector(lanes & 1, typename VectorOf<A>::bytes);
  memcpy(flags, &bytes, sizeof(bytes));
}

template <typename A>
BNFUSE_INLINE typename VectorOf<A>::bits load_flags(const uint8_t* flags) {
  typename VectorOf<A>::bytes bytes;
  memcpy(&bytes, flags, sizeof(bytes));
  return __builtin_convertvector(bytes, typename VectorOf<A>::bits) != 0;
}

// Every other lane of a and then of b: the first, third, … or the second, fourth, …
template <typename A, bool ODD>
BNFUSE_INLINE typename VectorOf<A>::type every_other(typename VectorOf<A>::type a, typename VectorOf<A>::type b) {
#ifdef __clang__
  typename VectorOf<A>::type lanes;
  for (int64_t i = 0; i < LANES<A>; ++i) lanes[i] = 2 * i < LANES<A> ? a[2 * i + ODD] : b[2 * i + ODD - LANES<A>];
  return lanes;
#else
  typename VectorOf<A>::bits from;
  for (int64_t i = 0; i < LANES<A>; ++i) from[i] = 2 * i + ODD;
  return __builtin_shuffle(a, b, from);
#endif
}

// The sums of each of the vectors' lanes, in pairs: lane i of the result is that of vectors[i], and COUNT is LANES. One after
// the other they would take as long as reading a small plane.
template <typename A, int64_t COUNT = LANES<A>>
BNFUSE_INLINE typename VectorOf<A>::type sum_each(const typename VectorOf<A>::type* vectors) {
  if constexpr (COUNT == 1) {
    return vectors[0];
  } else {
    const auto a = sum_each<A, COUNT / 2>(vectors), b = sum_each<A, COUNT / 2>(vectors + COUNT / 2);
    return every_other<A, false>(a, b) + every_other<A, true>(a, b);
  }
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
  A lanes[LANES<A>];
  store_vector<A>(v, lanes);
  return sum_pairwise<LANES<A>>(lanes);
}

// sums [LANES] of the lanes of vectors [rows] each, and zeros; the same bits however many rows there are.
template <typename A>
BNFUSE_INLINE void sum_rows(typename VectorOf<A>::type* vectors, int64_t rows, A* sums) {
  if (4 * rows > LANES<A>) {
    for (int64_t r = rows; r < LANES<A>; ++r) vectors[r] = typename VectorOf<A>::type{};
    store_vector<A>(sum_each<A>(vectors), sums);
  } else {
    store_vector<A>(typename VectorOf<A>::type{}, sums);
    for (int64_t r = 0; r < rows; ++r) sums[r] = sum_lanes<A>(vectors[r]);
  }
}

template <typename A>
A sum_span(const A* x, int64_t n) {
  using Vector = typename VectorOf<A>::type;
  Vector sum0{}, sum1{}, sum2{}, sum3{};
  int64_t i = 0;
  for (; i + 4 * LANES<A> <= n; i += 4 * LANES<A>) {
    sum0 += load_vector(x + i);
    sum1 += load_vector(x + i + LANES<A>);
    sum2 += load_vector(x + i + 2 * LANES<A>);
    sum3 += load_vector(x + i + 3 * LANES<A>);
  }
  for (; i + LANES<A> <= n; i += LANES<A>) sum0 += load_vector(x + i);
  A sum = sum_lanes<A>((sum0 + sum1) + (sum2 + sum3));
  for (; i < n; ++i) sum += x[i];
  return sum;
}

// ---- moments of planes, a channel each ----

// Mean and Σ(x − mean)² of x [n] in float64, for what overflows float32 on the way.
template <typename E>
void exact_moments(const E* x, int64_t n, double& mean, double& m2) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(widen(x[i]));
  mean = sum / double(n);
  m2 = 0;
  for (int64_t i = 0; i < n; ++i) m2 += (double(widen(x[i])) - mean) * (double(widen(x[i])) - mean);
}

// The sums of the rows of a tile, a plane or a piece of one each: LANES rows at most.
template <typename A>
struct PlaneSums {
  using Vector = typename VectorOf<A>::type;
  A pivots[LANES<A>];  // near the rows' means
  Vector s[LANES<A>];  // lanes whose sum is Σ(x − pivot)
  Vector q[LANES<A>];  // lanes whose sum is Σ(x − pivot)²
};

// Planes or pieces of planes, all n elements long: what their moments need that is the same for each of them.
//
// First the mean of a plane, then first and second moments about it: what rounding took from the mean comes back through
// the first moment, and a mean far larger than the deviation does not cancel.
template <typename A>
struct Span {
  using Vector = typename VectorOf<A>::type;
  using Bits = typename VectorOf<A>::bits;
  static constexpr int64_t LANES = bnfuse::LANES<A>;
  int64_t n, whole;  // elements; those of whole vectors
  double share;      // 1/n
  Bits rest;         // of the vector that ends with the span, the lanes that are in no whole vector

  explicit Span(int64_t n) : n(n), whole(n / LANES * LANES), share(1.0 / double(n)) {
    for (int64_t lane = 0; lane < LANES; ++lane) rest[lane] = lane >= LANES - (n - whole) ? -1 : 0;
  }

  // The vector that ends with the span; a shorter span fills its last lanes.
  template <typename E>
  BNFUSE_INLINE Vector load_last(const E* x) const {
    if (n >= LANES) return load_vector(x + n - LANES);
    A lanes[LANES] = {};
    for (int64_t i = 0; i < n; ++i) lanes[LANES - n + i] = widen(x[i]);
    return load_vector(lanes);
  }

  BNFUSE_INLINE Vector keep_rest(Vector v) const { return (Vector)((Bits)v & rest); }

  // Lanes whose sum is that of x [n].
  template <typename E>
  BNFUSE_INLINE Vector sum(const E* x) const {
    Vector sum0{}, sum1{}, sum2{}, sum3{};
    int64_t i = 0;
    for (; i + 4 * LANES <= whole; i += 4 * LANES) {
      sum0 += load_vector(x + i);
      sum1 += load_vector(x + i + LANES);
      sum2 += load_vector(x + i + 2 * LANES);
      sum3 += load_vector(x + i + 3 * LANES);
    }
    for (; i < whole; i += LANES) sum0 += load_vector(x + i);
    if (whole != n) sum1 += keep_rest(load_last(x));
    return (sum0 + sum1) + (sum2 + sum3);
  }

  // Adds row r, x [n], to the sums, and hands each of its vectors to use(where it begins, vector). The last one overlaps the one
  // before where the row ends amid it; a row shorter than a vector is not handed on.
  template <typename E, typename Use>
  BNFUSE_INLINE void add_row(const E* x, int64_t r, PlaneSums<A>& sums, const Use& use) const {
    const A pivot = sums.pivots[r];
    Vector s0{}, s1{}, q0{}, q1{};
    const auto add = [&](int64_t i, Vector& s, Vector& q) __attribute__((always_inline)) {
      const Vector v = load_vector(x + i), d = v - pivot;
      s += d;
      q += d * d;
      use(i, v);
    };
    int64_t i = 0;
    for (; i + 2 * LANES <= whole; i += 2 * LANES) {
      add(i, s0, q0);
      add(i + LANES, s1, q1);
    }
    if (i < whole) add(i, s0, q0);
    if (whole != n) {
      const Vector v = load_last(x), d = keep_rest(v - pivot);
      s1 += d;
      q1 += d * d;
      if (n >= LANES) use(n - LANES, v);
    }
    sums.s[r] = s0 + s1;
    sums.q[r] = q0 + q1;
  }

  // Of x [rows, n]; rows ≤ LANES.
  template <typename E>
  void find_pivots(const E* x, int64_t rows, PlaneSums<A>& sums) const {
    Vector lanes[LANES];
    for (int64_t r = 0; r < rows; ++r) lanes[r] = sum(x + r * n);
    sum_rows<A>(lanes, rows, sums.pivots);
    for (int64_t r = 0; r < LANES; ++r) sums.pivots[r] *= A(share);
  }

  // mean and m2 [rows] of x [rows, n], whose rows were added; there is room for LANES.
  template <typename E>
  void finish(const E* x, int64_t rows, PlaneSums<A>& sums, double* __restrict mean, double* __restrict m2) const {
    A s[LANES], q[LANES];
    sum_rows<A>(sums.s, rows, s);
    sum_rows<A>(sums.q, rows, q);
    const A* pivots = sums.pivots;
    int64_t finite = 1;  // as wide as a double, for the loop to vectorise
    const auto finish_row = [&](int64_t r) __attribute__((always_inline)) {
      const double off = double(s[r]) / double(n);  // not s·share: where all are alike, m2 is 0 to the last bit
      mean[r] = double(pivots[r]) + off;
      m2[r] = double(q[r]) - double(s[r]) * off;
      m2[r] = m2[r] < 0 ? 0 : m2[r];  // rounding alone makes it negative; NaN stays
      finite &= is_finite(m2[r]);
    };
    if (rows == 1) finish_row(0);
    else for (int64_t r = 0; r < LANES; ++r) finish_row(r);
    if (finite) return;
    for (int64_t r = 0; r < rows; ++r)
      if (!is_finite(m2[r])) exact_moments(x + r * n, n, mean[r], m2[r]);
  }
};

// ---- columns and their channels ----

// A tile's columns: column j belongs to its channel (j / run) % channels.
struct Columns {
  int64_t channels;  // of the tile
  int64_t run;       // neighbouring columns of one channel
  int64_t fold;      // times that all channels come again, a power of two
  int64_t period() const { return channels * run; }
  int64_t width() const { return fold * period(); }
};

// values [channels] → one for each column, in place.
template <typename A>
void spread(A* __restrict values, Columns columns) {
  if (columns.run > 1) {
    for (int64_t c = columns.channels - 1; c >= 0; --c) {
      const A value = values[c];
      for (int64_t i = 0; i < columns.run; ++i) values[c * columns.run + i] = value;
    }
  }
  for (int64_t i = columns.period(); i < columns.width(); ++i) values[i] = values[i - columns.period()];
}

// values [width] → their sums over each channel's columns in values [channels].
template <typename A>
void gather(A* __restrict values, Columns columns) {
  for (int64_t half = columns.fold / 2; half > 0; half /= 2)  // halves onto halves
    for (int64_t i = 0; i < half * columns.period(); ++i) values[i] += values[i + half * columns.period()];
  if (columns.run > 1)
    for (int64_t c = 0; c < columns.channels; ++c) values[c] = sum_span(values + c * columns.run, columns.run);
}

template <typename A>
struct ColumnBuffer {
  alignas(64) A values[COLUMN_TILE + APART];

  template <typename Function>
  BNFUSE_INLINE void fill(Columns columns, const Function& value) {
    for (int64_t c = 0; c < columns.channels; ++c) values[c] = value(c);
    spread(values, columns);
  }
};

// The moments of an item's columns, about a pivot near their mean, in S.
template <typename S>
struct ColumnMoments {
  alignas(64) S pivot[COLUMN_TILE + APART];
  alignas(64) S s[COLUMN_TILE + APART];  // Σ(x − pivot), of the last rows
  alignas(64) S q[COLUMN_TILE + APART];  // Σ(x − pivot)², of the last rows
  alignas(64) S settled_s[COLUMN_TILE + APART];
  alignas(64) S settled_q[COLUMN_TILE + APART];
  int64_t rows;  // the last ones
  bool trusted[COLUMN_TILE];     // of a channel, see finish

  void start(Columns columns) {
    for (int64_t i = 0; i < columns.width(); ++i) pivot[i] = s[i] = q[i] = settled_s[i] = settled_q[i] = 0;
    rows = 0;
  }

  template <typename E>
  void add_to_pivot(Tile<const E> x, Shape shape) {
    S* __restrict sum = pivot;
    for (int64_t r = 0; r < shape.rows; ++r) {
      const E* __restrict row = x.data + r * x.stride;
      for (int64_t i = 0; i < shape.width; ++i) sum[i] += widen(row[i]);
    }
  }

  void finish_pivot(Columns columns, double count) {
    gather(pivot, columns);
    for (int64_t c = 0; c < columns.channels; ++c) pivot[c] /= S(count);
    spread(pivot, columns);
  }

  template <typename E>
  void add(Tile<const E> x, Shape shape) {
    const S* __restrict p = pivot;
    S* __restrict s_out = s;
    S* __restrict q_out = q;
    for (int64_t r = 0; r < shape.rows; ++r) {
      const E* row = x.data + r * x.stride;
      for (int64_t i = 0; i < shape.width; ++i) {
        const S d = widen(row[i]) - p[i];
        s_out[i] += d;
        q_out[i] += d * d;
      }
    }
  }

  // After a tile of so many rows.
  void settle(Shape shape) {
    rows += shape.rows;
    if (rows < SETTLED_ROWS) return;
    for (int64_t i = 0; i < shape.width; ++i) {
      settled_s[i] += s[i];
      settled_q[i] += q[i];
      s[i] = q[i] = 0;
    }
    rows = 0;
  }

  // Not where the mean lies more than two deviations from the pivot, so that m2 loses digits, or where a sum has overflowed.
  static BNFUSE_INLINE int64_t is_trusted(double s, double m2, double share) {
    return int64_t(is_finite(m2)) & int64_t(!(s * (s * share) > 4 * m2));
  }

  // mean, m2 [channels] of the `count` elements a channel that were added; whether all are to be trusted.
  bool finish(Columns columns, double count, double* __restrict mean, double* __restrict m2) {
    for (int64_t i = 0; i < columns.width(); ++i) {
      s[i] += settled_s[i];
      q[i] += settled_q[i];
    }
    gather(s, columns);
    gather(q, columns);
    if (columns.run > 1)
      for (int64_t c = 0; c < columns.channels; ++c) pivot[c] = pivot[c * columns.run];
    // Plain loops over doubles, which vectorise: there may be as many channels to finish as rows were added.
    const double share = 1 / count;
    int64_t doubtful = 0;
    for (int64_t c = 0; c < columns.channels; ++c) {
      mean[c] = double(pivot[c]) + double(s[c]) * share;
      m2[c] = centred_m2(double(s[c]), double(q[c]), share);
      doubtful |= !is_trusted(double(s[c]), m2[c], share);
    }
    if (!doubtful) return true;
    for (int64_t c = 0; c < columns.channels; ++c) trusted[c] = is_trusted(double(s[c]), m2[c], share);
    return false;
  }
};

// ---- the mask of a tile: one byte an element in cache, one bit an element in memory ----

// The bytes of a register are taken in order from the lowest, as memory has them on the processors torch runs on.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the mask is packed for little-endian processors");

BNFUSE_INLINE uint8_t pack_eight(uint64_t flags) { return uint8_t((flags * 0x0102040810204080u) >> 56); }

BNFUSE_INLINE uint64_t unpack_eight(uint8_t bits) {
  const uint64_t spread = (bits * 0x0101010101010101u) & 0x8040201008040201u;  // byte j keeps bit j
  return ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

constexpr int64_t FLAGS_APART = 8;  // that pack reads and unpack writes beyond the last flag, at most

// flags [n] of 0 and 1 → mask [⌈n/8⌉], the last byte padded with zeros.
BNFUSE_INLINE void pack(const uint8_t* __restrict flags, int64_t n, uint8_t* __restrict mask) {
  int64_t i = 0;
#ifdef __SSE2__
  for (; i + 16 <= n; i += 16) {
    __m128i sixteen;
    memcpy(&sixteen, flags + i, 16);
    const uint16_t bits = uint16_t(_mm_movemask_epi8(_mm_slli_epi16(sixteen, 7)));
    memcpy(mask + i / 8, &bits, 2);
  }
#endif
  uint64_t eight = 0;
  for (; i + 8 <= n; i += 8) {
    memcpy(&eight, flags + i, 8);
    mask[i / 8] = pack_eight(eight);
  }
  if (i == n) return;
  memcpy(&eight, flags + i, 8);
  mask[i / 8] = pack_eight(eight & ((uint64_t(1) << 8 * (n - i)) - 1));
}

// The inverse of pack.
BNFUSE_INLINE void unpack(const uint8_t* __restrict mask, int64_t n, uint8_t* __restrict flags) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  for (; i + 16 <= n; i += 16) {
    __mmask16 bits;
    memcpy(&bits, mask + i / 8, 2);
    const __m128i sixteen = _mm_maskz_set1_epi8(bits, 1);
    memcpy(flags + i, &sixteen, 16);
  }
#endif
  for (; i < n; i += 8) {
    const uint64_t eight = unpack_eight(mask[i / 8]);
    memcpy(flags + i, &eight, 8);
  }
}

int64_t mask_bytes(int64_t row_length) { return (row_length + 7) / 8; }

// The mask of a tile: a row of the tile is `segments` runs of `length` elements, each with its own bytes of the mask.
struct MaskTile {
  uint8_t* bits;
  int64_t length, segment_stride, row_stride;  // of an element row; in bytes
};

// As one long run, where the bytes of runs follow each other and all of them are whole.
BNFUSE_INLINE MaskTile without_gaps(MaskTile mask, Shape shape) {
  if (mask.length % 8 == 0 && mask.segment_stride == mask.length / 8) mask.length = shape.width;
  return mask;
}

// How many of a row's runs of four are taken two at a time, eight flags: a byte has four of them.
int64_t runs_in_pairs(MaskTile mask, Shape shape) {
  return mask.length == 4 && mask.segment_stride == 1 ? shape.width / 8 * 2 : 0;
}

void pack_tile(const uint8_t* flags, Shape shape, MaskTile mask) {
  mask = without_gaps(mask, shape);
  const int64_t paired = runs_in_pairs(mask, shape);
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t k = 0; k < paired; k += 2) {
      uint64_t eight;
      memcpy(&eight, flags + r * shape.width + 4 * k, 8);
      const unsigned bits = pack_eight(eight);
      const uint16_t pair = uint16_t((bits & 0x0f) | (bits & 0xf0) << 4);
      memcpy(mask.bits + r * mask.row_stride + k, &pair, 2);
    }
    for (int64_t i = paired * mask.length, k = paired; i < shape.width; i += mask.length, ++k)
      pack(flags + r * shape.width + i, mask.length, mask.bits + r * mask.row_stride + k * mask.segment_stride);
  }
}

// In memory's order: what is written beyond a run is written over by the next.
void unpack_tile(MaskTile mask, Shape shape, uint8_t* flags) {
  mask = without_gaps(mask, shape);
  const int64_t paired = runs_in_pairs(mask, shape);
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t k = 0; k < paired; k += 2) {
      uint16_t pair;
      memcpy(&pair, mask.bits + r * mask.row_stride + k, 2);
      const uint64_t eight = unpack_eight(uint8_t((pair & 0x0f) | (pair >> 4 & 0xf0)));
      memcpy(flags + r * shape.width + 4 * k, &eight, 8);
    }
    for (int64_t i = paired * mask.length, k = paired; i < shape.width; i += mask.length, ++k)
      unpack(mask.bits + r * mask.row_stride + k * mask.segment_stride, mask.length, flags + r * shape.width + i);
  }
}

// ---- forward, a tile of planes: y = act(scale·x + shift (+ residual)), the flags of the mask, and its sums ----

// flags [rows·width], written where a mask is needed.
template <typename E, typename A = Accumulator<E>>
using PlanesFunction = void (*)(Tile<const E> x, Tile<const E> residual, Tile<E> y, Shape, Coefficients<A>, A slope,
                                uint8_t* flags, const Span<A>& span, PlaneSums<A>& sums);

template <typename E, Act ACT, bool RESIDUAL, typename A = Accumulator<E>>
void apply_to_planes(Tile<const E> x, Tile<const E> residual, Tile<E> y, Shape shape, Coefficients<A> coefficients, A slope,
                     uint8_t* flags, const Span<A>& span, PlaneSums<A>& sums) {
  constexpr bool MASK = RESIDUAL && is_two_slope(ACT);
  for (int64_t r = 0; r < shape.rows; ++r) {
    const E* x_row = x.data + r * x.stride;
    const E* residual_row = RESIDUAL ? residual.data + r * residual.stride : nullptr;
    E* y_row = y.data + r * y.stride;
    uint8_t* flags_row = MASK ? flags + r * shape.width : nullptr;
    const A scale = coefficients.scale[r], shift = coefficients.shift[r];
    // Whole vectors alone where there is one: short rows would spend most of their time on what is left over.
    span.add_row(x_row, r, sums, [&](int64_t begin, typename VectorOf<A>::type v) __attribute__((always_inline)) {
      typename VectorOf<A>::type z = scale * v + shift;
      if (RESIDUAL) z += load_vector(residual_row + begin);
      if (MASK) store_flags<A>(on_upper_slope<ACT>(z), flags_row + begin);
      A lanes[LANES<A>];
#pragma GCC unroll 1
      for (int64_t i = 0; i < LANES<A>; ++i) lanes[i] = activation<ACT>(z[i], slope);
      store_vector(load_vector(lanes), y_row + begin);
    });
    if (shape.width >= LANES<A>) continue;
    for (int64_t i = 0; i < shape.width; ++i) {
      A z = scale * widen(x_row[i]) + shift;
      if (RESIDUAL) z += widen(residual_row[i]);
      if (MASK) flags_row[i] = on_upper_slope<ACT>(z);
      narrow(activation<ACT>(z, slope), y_row[i]);
    }
  }
}

template <typename E, bool RESIDUAL>
PlanesFunction<E> select_apply_to_planes(Act act) {
  switch (act) {
    case Act::relu: return apply_to_planes<E, Act::relu, RESIDUAL>;
    case Act::relu6: return apply_to_planes<E, Act::relu6, RESIDUAL>;
    case Act::leaky_relu: return apply_to_planes<E, Act::leaky_relu, RESIDUAL>;
    case Act::silu: return apply_to_planes<E, Act::silu, RESIDUAL>;
    case Act::hardswish: return apply_to_planes<E, Act::hardswish, RESIDUAL>;
    default: return apply_to_planes<E, Act::identity, RESIDUAL>;
  }
}

// ---- forward, a tile of columns: the same ----

// flags [rows·width], written where a mask is needed.
template <typename E, typename A = Accumulator<E>>
using ColumnsFunction = void (*)(Tile<const E> x, Tile<const E> residual, Tile<E> y, Shape, Coefficients<A>, A slope,
                                 uint8_t* flags, ColumnMoments<A>& moments);

template <typename E, Act ACT, bool RESIDUAL, typename A = Accumulator<E>>
void apply_to_columns(Tile<const E> x, Tile<const E> residual, Tile<E> y, Shape shape, Coefficients<A> coefficients, A slope,
                      uint8_t* flags, ColumnMoments<A>& moments) {
  constexpr bool MASK = RESIDUAL && is_two_slope(ACT);
  const A *scale = coefficients.scale, *shift = coefficients.shift, *pivot = moments.pivot;
  A *s = moments.s, *q = moments.q;
  const bool several = several_at_once<E>(x.stride, shape);
  for_rows(shape.rows, several, [&](int64_t first, auto rows_at_once) __attribute__((always_inline)) {
    constexpr int ROWS = decltype(rows_at_once)::value;
    const E *x_rows[ROWS], *residual_rows[ROWS];
    E* y_rows[ROWS];
    uint8_t* flags_rows[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      x_rows[r] = x.data + (first + r) * x.stride;
      residual_rows[r] = RESIDUAL ? residual.data + (first + r) * residual.stride : nullptr;
      y_rows[r] = y.data + (first + r) * y.stride;
      flags_rows[r] = MASK ? flags + (first + r) * shape.width : nullptr;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < shape.width; ++i) {
      A sum = s[i], squares = q[i];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const A value = widen(x_rows[r][i]), d = value - pivot[i];
        sum += d;
        squares += d * d;
        A z = scale[i] * value + shift[i];
        if (RESIDUAL) z += widen(residual_rows[r][i]);
        if (MASK) flags_rows[r][i] = on_upper_slope<ACT>(z);
        narrow(activation<ACT>(z, slope), y_rows[r][i]);
      }
      s[i] = sum;
      q[i] = squares;
    }
  });
}

template <typename E, bool RESIDUAL>
ColumnsFunction<E> select_apply_to_columns(Act act) {
  switch (act) {
    case Act::relu: return apply_to_columns<E, Act::relu, RESIDUAL>;
    case Act::relu6: return apply_to_columns<E, Act::relu6, RESIDUAL>;
    case Act::leaky_relu: return apply_to_columns<E, Act::leaky_relu, RESIDUAL>;
    case Act::silu: return apply_to_columns<E, Act::silu, RESIDUAL>;
    case Act::hardswish: return apply_to_columns<E, Act::hardswish, RESIDUAL>;
    default: return apply_to_columns<E, Act::identity, RESIDUAL>;
  }
}

// Everything that a tile's forward needs besides its place; chosen once for each share of the work.
template <typename T, bool SAME>
struct ForwardTile {
  using A = Accumulator<T>;
  using E = Element<T>;
  using Function = std::conditional_t<SAME, PlanesFunction<E>, ColumnsFunction<E>>;
  const Forward& f;
  Function function;
  alignas(64) A x_buffer[TILE_SIZE + APART];
  alignas(64) A residual_buffer[TILE_SIZE + APART];
  alignas(64) A y_buffer[TILE_SIZE + APART];
  uint8_t flags[TILE_SIZE + FLAGS_APART];

  explicit ForwardTile(const Forward& f) : f(f), function(f.residual ? select<true>(f.act) : select<false>(f.act)) {}

  template <bool RESIDUAL>
  static Function select(Act act) {
    if constexpr (SAME) return select_apply_to_planes<E, RESIDUAL>(act);
    if constexpr (!SAME) return select_apply_to_columns<E, RESIDUAL>(act);
  }

  Tile<const E> load_x(int64_t at, int64_t stride, Shape shape) {
    return load(static_cast<const T*>(f.x) + at, stride, shape, x_buffer);
  }

  // y of the tile at element `at`, whose rows lie `stride` apart; x is what load_x gave for it, and is added to `sums`: those of
  // the walk, as its function takes them.
  template <typename... Sums>
  void operator()(Tile<const E> x, int64_t at, int64_t stride, Shape shape, Coefficients<A> coefficients, MaskTile mask,
                  Sums&... sums) {
    Tile<const E> residual{nullptr, 0};
    if (f.residual) residual = load(static_cast<const T*>(f.residual) + at, stride, shape, residual_buffer);
    T* out = static_cast<T*>(f.y) + at;
    const Tile<E> y = target(out, stride, shape, y_buffer);
    function(x, residual, y, shape, coefficients, A(f.slope), flags, sums...);
    store(y, out, stride, shape);
    if (mask.bits) pack_tile(flags, shape, mask);
  }
};

// ---- backward, a tile, in two steps: dz = act'·dy, then dx = scale·dz + a + b·(x − mean) ----

// dz is the gradient of the residual too.
template <typename E, typename A = Accumulator<E>>
using DeriveFunction = void (*)(Tile<const E> dy, Tile<const E> x, Tile<const E> residual, Shape, Coefficients<A>, A slope,
                                Tile<A> dz);

template <typename E, Act ACT, bool RESIDUAL, bool SAME, typename A = Accumulator<E>>
void derive(Tile<const E> dy, Tile<const E> x, Tile<const E> residual, Shape shape, Coefficients<A> coefficients, A slope,
            Tile<A> dz) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const E* __restrict x_row = x.data + r * x.stride;
    const E* __restrict residual_row = RESIDUAL ? residual.data + r * residual.stride : nullptr;
    const E* __restrict dy_row = dy.data + r * dy.stride;
    A* __restrict dz_row = dz.data + r * dz.stride;
    for (int64_t i = 0; i < shape.width; ++i) {
      A z = of<SAME>(coefficients.scale, r, i) * widen(x_row[i]) + of<SAME>(coefficients.shift, r, i);
      if (RESIDUAL) z += widen(residual_row[i]);
      dz_row[i] = derivative<ACT>(z, slope) * widen(dy_row[i]);
    }
  }
}

template <typename E, bool RESIDUAL, bool SAME>
DeriveFunction<E> select_derive(Act act) {
  switch (act) {
    case Act::relu: return derive<E, Act::relu, RESIDUAL, SAME>;
    case Act::relu6: return derive<E, Act::relu6, RESIDUAL, SAME>;
    case Act::leaky_relu: return derive<E, Act::leaky_relu, RESIDUAL, SAME>;
    case Act::silu: return derive<E, Act::silu, RESIDUAL, SAME>;
    case Act::hardswish: return derive<E, Act::hardswish, RESIDUAL, SAME>;
    default: return derive<E, Act::identity, false, SAME>;
  }
}

template <typename E, typename A = Accumulator<E>>
void derive_from_flags(Tile<const E> dy, Shape shape, const uint8_t* flags, A below, Tile<A> dz) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const E* __restrict dy_row = dy.data + r * dy.stride;
    const uint8_t* __restrict flags_row = flags + r * shape.width;
    A* __restrict dz_row = dz.data + r * dz.stride;
    for (int64_t i = 0; i < shape.width; ++i) dz_row[i] = (flags_row[i] ? A(1) : below) * widen(dy_row[i]);
  }
}

// Both steps in one loop, for the common case: dy and dvar are there, act' comes from x alone, and nobody wants dz.
template <typename E, typename A = Accumulator<E>>
using BackwardFunction = void (*)(Tile<const E> dy, Tile<const E> x, Shape, Coefficients<A>, A slope, Tile<E> dx);

template <typename E, Act ACT, bool SAME, typename A = Accumulator<E>>
void backward_at_once(Tile<const E> dy, Tile<const E> x, Shape shape, Coefficients<A> coefficients, A slope, Tile<E> dx) {
  const bool several = !SAME && several_at_once<E>(x.stride, shape);
  for_rows(shape.rows, several, [&](int64_t first, auto rows_at_once) __attribute__((always_inline)) {
    constexpr int ROWS = decltype(rows_at_once)::value;
    const E *x_rows[ROWS], *dy_rows[ROWS];
    E* dx_rows[ROWS];  // may be dy_rows: an element is read before it is written, and never again
    for (int r = 0; r < ROWS; ++r) {
      x_rows[r] = x.data + (first + r) * x.stride;
      dy_rows[r] = dy.data + (first + r) * dy.stride;
      dx_rows[r] = dx.data + (first + r) * dx.stride;
    }
    const A scale_r = coefficients.scale[SAME ? first : 0], shift_r = coefficients.shift[SAME ? first : 0];
    const A mean_r = coefficients.mean[SAME ? first : 0];
    const A a_r = coefficients.dmean[SAME ? first : 0], b_r = coefficients.dvar[SAME ? first : 0];
#pragma GCC ivdep
    for (int64_t i = 0; i < shape.width; ++i) {
      const A scale = SAME ? scale_r : coefficients.scale[i], shift = SAME ? shift_r : coefficients.shift[i];
      const A mean = SAME ? mean_r : coefficients.mean[i];
      const A a = SAME ? a_r : coefficients.dmean[i], b = SAME ? b_r : coefficients.dvar[i];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const A value = widen(x_rows[r][i]);
        const A dz = derivative<ACT>(scale * value + shift, slope) * widen(dy_rows[r][i]);
        narrow(scale * dz + (a + b * (value - mean)), dx_rows[r][i]);
      }
    }
  });
}

template <typename E, bool SAME>
BackwardFunction<E> select_backward_at_once(Act act) {
  switch (act) {
    case Act::relu: return backward_at_once<E, Act::relu, SAME>;
    case Act::relu6: return backward_at_once<E, Act::relu6, SAME>;
    case Act::leaky_relu: return backward_at_once<E, Act::leaky_relu, SAME>;
    case Act::silu: return backward_at_once<E, Act::silu, SAME>;
    case Act::hardswish: return backward_at_once<E, Act::hardswish, SAME>;
    default: return backward_at_once<E, Act::identity, SAME>;
  }
}

// The same where act' comes from the mask, and dz is wanted for the residual.
template <typename E, bool SAME, typename A = Accumulator<E>>
void masked_backward_at_once(Tile<const E> dy, Tile<const E> x, Shape shape, const uint8_t* flags, Coefficients<A> coefficients,
                             A below, Tile<E> dz, Tile<E> dx) {
  using Vector = typename VectorOf<A>::type;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const E *x_row = x.data + r * x.stride, *dy_row = dy.data + r * dy.stride;
    const uint8_t* flags_row = flags + r * shape.width;
    E *dz_row = dz.data + r * dz.stride, *dx_row = dx.data + r * dx.stride;  // dx_row may be dy_row, as above
    const auto element = [&](int64_t i) __attribute__((always_inline)) {
      const A dz_i = (flags_row[i] ? A(1) : below) * widen(dy_row[i]);
      narrow(dz_i, dz_row[i]);
      narrow(of<SAME>(coefficients.scale, r, i) * dz_i +
                 (of<SAME>(coefficients.dmean, r, i) +
                  of<SAME>(coefficients.dvar, r, i) * (widen(x_row[i]) - of<SAME>(coefficients.mean, r, i))),
             dx_row[i]);
    };
    const auto vector = [&](int64_t i, Vector dy_i) __attribute__((always_inline)) {
      const Vector dz_i = load_flags<A>(flags_row + i) ? dy_i : below * dy_i;
      store_vector(dz_i, dz_row + i);
      const Vector through_moments = vector_of<SAME>(coefficients.dmean, r, i) +
                                     vector_of<SAME>(coefficients.dvar, r, i) *
                                         (load_vector(x_row + i) - vector_of<SAME>(coefficients.mean, r, i));
      store_vector(vector_of<SAME>(coefficients.scale, r, i) * dz_i + through_moments, dx_row + i);
    };
    if (shape.width < LANES<A>) {
      for (int64_t i = 0; i < shape.width; ++i) element(i);
      continue;
    }
    // The last vector once more where the row ends amid it, from what dy was there before.
    const Vector last = load_vector(dy_row + shape.width - LANES<A>);
    int64_t i = 0;
    for (; i + LANES<A> <= shape.width; i += LANES<A>) vector(i, load_vector(dy_row + i));
    if (i < shape.width) vector(shape.width - LANES<A>, last);
  }
}

// An absent dvar must not touch x: 0·inf would be NaN.
template <typename E, bool DY, bool DVAR, bool SAME, typename A = Accumulator<E>>
void combine(Tile<const A> dz, Tile<const E> x, Shape shape, Coefficients<A> coefficients, Tile<E> dx) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const E* __restrict x_row = x.data + r * x.stride;
    const A* __restrict dz_row = DY ? dz.data + r * dz.stride : nullptr;
    E* __restrict dx_row = dx.data + r * dx.stride;
    for (int64_t i = 0; i < shape.width; ++i) {
      A sum = of<SAME>(coefficients.dmean, r, i);
      if (DVAR) sum += of<SAME>(coefficients.dvar, r, i) * (widen(x_row[i]) - of<SAME>(coefficients.mean, r, i));
      if (DY) sum += of<SAME>(coefficients.scale, r, i) * dz_row[i];
      narrow(sum, dx_row[i]);
    }
  }
}

// Everything that a tile's backward needs besides its place; chosen once for each share of the work. dx may be dy: a
// tile of dy has been read before dx is written there.
template <typename T, bool SAME>
struct BackwardTile {
  using A = Accumulator<T>;
  using E = Element<T>;
  const Backward& f;
  DeriveFunction<E> derive;
  BackwardFunction<E> at_once;  // or null
  alignas(64) A x_buffer[TILE_SIZE + APART];
  alignas(64) A dy_buffer[TILE_SIZE + APART];
  alignas(64) A residual_buffer[TILE_SIZE + APART];
  alignas(64) A dz_buffer[TILE_SIZE + APART];
  alignas(64) A dx_buffer[TILE_SIZE + APART];
  uint8_t flags[TILE_SIZE + FLAGS_APART];

  explicit BackwardTile(const Backward& f)
      : f(f),
        derive(f.residual ? select_derive<E, true, SAME>(f.act) : select_derive<E, false, SAME>(f.act)),
        at_once(f.dy && f.dvar && !f.residual && !f.mask && !f.dresidual ? select_backward_at_once<E, SAME>(f.act)
                                                                         : nullptr) {}

  // The tile at element `at`, whose rows lie `stride` apart.
  void operator()(int64_t at, int64_t stride, Shape shape, Coefficients<A> coefficients, MaskTile mask) {
    const Tile<const E> x = load(static_cast<const T*>(f.x) + at, stride, shape, x_buffer);
    T* out = static_cast<T*>(f.dx) + at;
    const Tile<E> dx = target(out, stride, shape, dx_buffer);
    if (at_once) {
      at_once(load(static_cast<const T*>(f.dy) + at, stride, shape, dy_buffer), x, shape, coefficients, A(f.slope), dx);
      store(dx, out, stride, shape);
      return;
    }
    if (f.dy && f.dvar && f.mask && f.dresidual) {
      T* dresidual = static_cast<T*>(f.dresidual) + at;
      const Tile<E> dz = target(dresidual, stride, shape, dz_buffer);
      const Tile<const E> dy = load(static_cast<const T*>(f.dy) + at, stride, shape, dy_buffer);
      unpack_tile(mask, shape, flags);
      masked_backward_at_once<E, SAME>(dy, x, shape, flags, coefficients, A(lower_slope(f.act, f.slope)), dz, dx);
      store(dz, dresidual, stride, shape);
      store(dx, out, stride, shape);
      return;
    }
    const Tile<A> dz{dz_buffer, shape.width};
    if (f.dy) {
      const Tile<const E> dy = load(static_cast<const T*>(f.dy) + at, stride, shape, dy_buffer);
      if (mask.bits) {
        unpack_tile(mask, shape, flags);
        derive_from_flags(dy, shape, flags, A(lower_slope(f.act, f.slope)), dz);
      } else {
        Tile<const E> residual{nullptr, 0};
        if (f.residual) residual = load(static_cast<const T*>(f.residual) + at, stride, shape, residual_buffer);
        derive(dy, x, residual, shape, coefficients, A(f.slope), dz);
      }
    } else if (f.dresidual) {
      memset(dz_buffer, 0, sizeof(dz_buffer));
    }
    if (f.dresidual) store(dz, static_cast<T*>(f.dresidual) + at, stride, shape);
    const auto combine_tile = f.dy ? (f.dvar ? combine<E, true, true, SAME> : combine<E, true, false, SAME>)
                                   : (f.dvar ? combine<E, false, true, SAME> : combine<E, false, false, SAME>);
    combine_tile({dz.data, dz.stride}, x, shape, coefficients, dx);
    store(dx, out, stride, shape);
  }
};

// ---- the walk over planes, [N·C, L] in memory's order ----

// The moments of an item's channels, to which its planes are added as they follow: all channels of a sample, then the next's.
struct ItemMoments {
  double *mean, *m2;  // [channels]
  int64_t channels, plane_size;
  int64_t channel = 0;  // of the next plane
  int64_t before = 0;   // elements of a channel in the samples before
  MergeWeights weights;

  ItemMoments(double* mean, double* m2, int64_t channels, int64_t plane_size)
      : mean(mean), m2(m2), channels(channels), plane_size(plane_size), weights(merge_weights(0, double(plane_size))) {
    for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  }

  // The means of the next planes' channels in the samples before, which are there before the planes have been read. Where they
  // lie far from the planes' own, the channel's moments do not suffer: of the square of the distance, which rounding is a part
  // of, half at least is in its Σ(x − mean)² (Welford's update).
  template <typename A>
  BNFUSE_INLINE void copy_means(int64_t planes, A* means) const {
    for (int64_t k = 0; k < planes; ++k) means[k] = A(mean[channel + k]);
  }

  // The moments of the next planes, mean_b and m2_b [planes].
  void add(const double* mean_b, const double* m2_b, int64_t planes) {
    for (int64_t i = 0; i < planes;) {
      const int64_t here = planes - i < channels - channel ? planes - i : channels - channel;  // of one sample
#pragma GCC ivdep
      for (int64_t k = 0; k < here; ++k) merge_moments(mean[channel + k], m2[channel + k], mean_b[i + k], m2_b[i + k], weights);
      i += here;
      channel += here;
      if (channel < channels) continue;
      channel = 0;
      before += plane_size;
      weights = merge_weights(double(before), double(plane_size));
    }
  }
};

// Items [begin, end). A tile is a piece of a plane, or some planes, of one sample or of several.
template <typename T>
void forward_planes_of(const Forward& f, const PlaneWalk& walk, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  ForwardTile<T, true> forward_tile(f);
  const int64_t width = f.plane_size < FORWARD_TILE ? f.plane_size : FORWARD_TILE;
  const int64_t most = FORWARD_TILE / width < LANES<A> ? FORWARD_TILE / width : LANES<A>;
  const Span<A> whole_tile(width), last_tile((f.plane_size - 1) % FORWARD_TILE + 1);
  A scale[LANES<A>], shift[LANES<A>];  // of each row of a tile
  double mean[LANES<A>], m2[LANES<A>], piece_mean[LANES<A>], piece_m2[LANES<A>];
  PlaneSums<A> sums;
  const Coefficients<A> coefficients{scale, shift, nullptr, nullptr, nullptr};

  for (int64_t number = begin; number < end; ++number) {
    const int64_t chunk = number / walk.channel_tiles, first = number % walk.channel_tiles * walk.tile_channels;
    const int64_t left = f.channels - first, channels = left < walk.tile_channels ? left : walk.tile_channels;
    const RowChunk samples = walk.chunks[chunk];
    const int64_t at_moments = chunk * f.channels + first;
    ItemMoments moments(f.partial_mean + at_moments, f.partial_m2 + at_moments, channels, f.plane_size);
    const int64_t last_plane = (samples.end - 1) * f.channels + first + channels;
    for (int64_t plane = samples.begin * f.channels + first, rows; plane < last_plane; plane += rows) {
      rows = last_plane - plane < most ? last_plane - plane : most;
      if (f.y && rows == LANES<A> && moments.channel + rows <= channels) {  // of one sample, as it mostly is
        memcpy(scale, static_cast<const A*>(f.scale) + first + moments.channel, sizeof(scale));
        memcpy(shift, static_cast<const A*>(f.shift) + first + moments.channel, sizeof(shift));
      } else if (f.y) {
        for (int64_t r = 0, c = moments.channel; r < rows; ++r, c = c + 1 < channels ? c + 1 : 0) {
          scale[r] = static_cast<const A*>(f.scale)[first + c];
          shift[r] = static_cast<const A*>(f.shift)[first + c];
        }
      }
      for (int64_t i = 0; i < f.plane_size; i += FORWARD_TILE) {
        const Shape shape{rows, f.plane_size - i < width ? f.plane_size - i : width};
        const int64_t at = plane * f.plane_size + i, bytes = mask_bytes(f.plane_size);
        const Tile<const Element<T>> x = forward_tile.load_x(at, f.plane_size, shape);
        const Span<A>& span = shape.width == whole_tile.n ? whole_tile : last_tile;
        const MaskTile mask{f.mask ? f.mask + plane * bytes + i / 8 : nullptr, shape.width, 0, bytes};
        if (moments.before && moments.channel + rows <= channels) moments.copy_means(rows, sums.pivots);
        else span.find_pivots(x.data, rows, sums);
        if (f.y) forward_tile(x, at, f.plane_size, shape, coefficients, mask, span, sums);
        else for (int64_t r = 0; r < rows; ++r) span.add_row(x.data + r * shape.width, r, sums, [](int64_t, auto) {});
        if (i == 0) {
          span.finish(x.data, rows, sums, mean, m2);
          continue;
        }
        span.finish(x.data, rows, sums, piece_mean, piece_m2);
        const MergeWeights weights = merge_weights(double(i), double(shape.width));
        for (int64_t r = 0; r < rows; ++r) merge_moments(mean[r], m2[r], piece_mean[r], piece_m2[r], weights);
      }
      moments.add(mean, m2, rows);
    }
  }
}

// A tile is a piece of a plane, or some planes of one sample: memory is read in its order, however small the planes.
template <typename T>
void backward_planes_of(const Backward& f, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  BackwardTile<T, true> backward_tile(f);
  A a[BACKWARD_TILE], b[BACKWARD_TILE];  // of each row of a tile
  const int64_t width = f.plane_size < BACKWARD_TILE ? f.plane_size : BACKWARD_TILE, most = BACKWARD_TILE / width;
  for (int64_t plane = begin, rows; plane < end; plane += rows) {
    const int64_t c = plane % f.channels, group = f.sample_groups[plane / f.channels];
    const int64_t g_c = group * f.channels + c, left = f.channels - c < end - plane ? f.channels - c : end - plane;
    rows = left < most ? left : most;
    const A count = A(f.counts[group]);
    for (int64_t r = 0; r < rows; ++r) {
      a[r] = f.dmean ? mean_coefficient(static_cast<const A*>(f.dmean)[g_c + r], count) : A(0);
      b[r] = f.dvar ? var_coefficient(static_cast<const A*>(f.dvar)[g_c + r], count) : A(0);
    }
    const Coefficients<A> coefficients{static_cast<const A*>(f.scale) + c, static_cast<const A*>(f.shift) + c,
                                       static_cast<const A*>(f.mean) + g_c, a, b};
    for (int64_t i = 0; i < f.plane_size; i += BACKWARD_TILE) {
      const Shape shape{rows, f.plane_size - i < width ? f.plane_size - i : width};
      const int64_t bytes = mask_bytes(f.plane_size);
      const MaskTile mask{f.mask ? const_cast<uint8_t*>(f.mask) + plane * bytes + i / 8 : nullptr, shape.width, 0, bytes};
      backward_tile(plane * f.plane_size + i, f.plane_size, shape, coefficients, mask);
    }
  }
}

// ---- the walk over columns: items [begin, end), each the columns of one tile in the rows of one chunk ----

// One item of the work, found from its number.
struct Item {
  RowChunk rows;
  int64_t first_channel;
  Columns columns;
  int64_t chunk;

  Item(const ColumnWalk& walk, int64_t number) {
    chunk = number / walk.channel_tiles;
    rows = walk.chunks[chunk];
    first_channel = number % walk.channel_tiles * walk.tile_channels;
    const int64_t left = walk.channels - first_channel;
    columns = {left < walk.tile_channels ? left : walk.tile_channels, walk.run, walk.fold};
  }

  // Calls tile(element it starts at, its shape, stride of its rows, row of memory it starts at) for all tiles: whole rows of
  // the tile, and at the end one shorter row with the rows of memory left over.
  template <typename Function>
  BNFUSE_INLINE void for_each_tile(const ColumnWalk& walk, const Function& tile) const {
    const int64_t row_elements = walk.channels * walk.run;  // of a row of memory
    const int64_t width = columns.width(), stride = walk.fold * row_elements;
    // Rows that several_at_once takes together need longer tiles, or there would not be several.
    const int64_t most = (stride > width || width >= WIDE ? TILE_SIZE : COLUMN_TILE) / width;
    const int64_t step = most < SETTLED_ROWS ? most : SETTLED_ROWS;
    const int64_t whole = (rows.end - rows.begin) / walk.fold, rest = (rows.end - rows.begin) % walk.fold;
    const int64_t start = rows.begin * row_elements + first_channel * walk.run;
    for (int64_t r = 0; r < whole; r += step) {
      tile(start + r * stride, Shape{whole - r < step ? whole - r : step, width}, stride, rows.begin + r * walk.fold);
    }
    if (rest)
      tile(start + whole * stride, Shape{1, rest * columns.channels * columns.run}, stride, rows.begin + whole * walk.fold);
  }

  // Calls tile(element it starts at, its shape) for at most `count` rows, spread evenly over the item since neighbours are
  // alike; returns how many rows of memory they are.
  template <typename Function>
  BNFUSE_INLINE int64_t for_some_rows(const ColumnWalk& walk, int64_t count, const Function& tile) const {
    const int64_t row_elements = walk.channels * walk.run, start = rows.begin * row_elements + first_channel * walk.run;
    const int64_t rows_here = rows.end - rows.begin, whole = rows_here / walk.fold;
    if (whole == 0) {
      tile(start, Shape{1, rows_here * columns.channels * columns.run});
      return rows_here;
    }
    const int64_t some = whole < count ? whole : count;
    for (int64_t i = 0; i < some; ++i) tile(start + i * whole / some * walk.fold * row_elements, Shape{1, columns.width()});
    return some * walk.fold;
  }

  MaskTile mask(const ColumnWalk& walk, uint8_t* bits, int64_t row) const {
    if (!bits) return {nullptr, 1, 0, 0};
    if (walk.run > 1) {  // a row of memory is a sample, and each of its planes has its own bytes, which follow each other
      const int64_t bytes = mask_bytes(walk.run);
      return {bits + (row * walk.channels + first_channel) * bytes, walk.run, bytes, walk.fold * walk.channels * bytes};
    }
    const int64_t bytes = mask_bytes(walk.channels);
    return {bits + row * bytes + first_channel / 8, columns.channels, bytes, walk.fold * bytes};
  }
};

// mean and m2 [channels] of an item once more in float64 where they are not to be trusted, about what is the mean but for its
// last digits. Seldom called, and not inlined: its sums would take half of the caller's stack.
template <typename T>
__attribute__((noinline)) void take_doubtful_exactly(const ColumnWalk& walk, const Item& item, double count,
                                                     const ColumnMoments<Accumulator<T>>& moments,
                                                     ForwardTile<T, false>& forward_tile, double* mean, double* m2) {
  ColumnMoments<double> exact;
  exact.start(item.columns);
  for (int64_t c = 0; c < item.columns.channels; ++c) exact.pivot[c] = is_finite(mean[c]) ? mean[c] : 0;
  spread(exact.pivot, item.columns);
  const auto add_exactly = [&](int64_t at, Shape shape, int64_t stride, int64_t) {
    exact.add(forward_tile.load_x(at, stride, shape), shape);
  };
  item.for_each_tile(walk, add_exactly);
  double exact_mean[COLUMN_TILE], exact_m2[COLUMN_TILE];
  exact.finish(item.columns, count, exact_mean, exact_m2);
  for (int64_t c = 0; c < item.columns.channels; ++c) {
    if (moments.trusted[c]) continue;
    mean[c] = exact_mean[c];
    m2[c] = exact_m2[c];
  }
}

template <typename T>
void forward_columns_of(const Forward& f, const ColumnWalk& walk, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  ForwardTile<T, false> forward_tile(f);
  ColumnMoments<A> moments;
  ColumnBuffer<A> scale, shift;
  const Coefficients<A> coefficients{scale.values, shift.values, nullptr, nullptr, nullptr};

  for (int64_t number = begin; number < end; ++number) {
    const Item item(walk, number);
    const int64_t first = item.first_channel, rows = item.rows.end - item.rows.begin;
    if (f.y) {
      scale.fill(item.columns, [&](int64_t c) { return static_cast<const A*>(f.scale)[first + c]; });
      shift.fill(item.columns, [&](int64_t c) { return static_cast<const A*>(f.shift)[first + c]; });
    }
    moments.start(item.columns);
    const int64_t pivot_rows = item.for_some_rows(walk, PIVOT_ROWS, [&](int64_t at, Shape shape) {
      moments.add_to_pivot(forward_tile.load_x(at, shape.width, shape), shape);
    });
    moments.finish_pivot(item.columns, double(pivot_rows * walk.run));
    const auto add_and_apply = [&](int64_t at, Shape shape, int64_t stride, int64_t row) {
      const Tile<const Element<T>> x = forward_tile.load_x(at, stride, shape);
      if (f.y) forward_tile(x, at, stride, shape, coefficients, item.mask(walk, f.mask, row), moments);
      else moments.add(x, shape);
      moments.settle(shape);
    };
    item.for_each_tile(walk, add_and_apply);
    const double count = double(rows * walk.run);
    double* mean = f.partial_mean + item.chunk * f.channels + first;
    double* m2 = f.partial_m2 + item.chunk * f.channels + first;
    if (!moments.finish(item.columns, count, mean, m2)) take_doubtful_exactly(walk, item, count, moments, forward_tile, mean, m2);
  }
}

template <typename T>
void backward_columns_of(const Backward& f, const ColumnWalk& walk, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  BackwardTile<T, false> backward_tile(f);
  ColumnBuffer<A> scale, shift, mean, a, b;
  const Coefficients<A> coefficients{scale.values, shift.values, mean.values, a.values, b.values};

  for (int64_t number = begin; number < end; ++number) {
    const Item item(walk, number);
    const int64_t first = item.first_channel, group = item.rows.group;
    const int64_t g_c = group * f.channels + first;
    const A count = A(f.counts[group]);
    if (f.dy) {
      scale.fill(item.columns, [&](int64_t c) { return static_cast<const A*>(f.scale)[first + c]; });
      shift.fill(item.columns, [&](int64_t c) { return static_cast<const A*>(f.shift)[first + c]; });
    }
    mean.fill(item.columns, [&](int64_t c) { return static_cast<const A*>(f.mean)[g_c + c]; });
    a.fill(item.columns, [&](int64_t c) {
      return f.dmean ? mean_coefficient(static_cast<const A*>(f.dmean)[g_c + c], count) : A(0);
    });
    b.fill(item.columns, [&](int64_t c) {
      return f.dvar ? var_coefficient(static_cast<const A*>(f.dvar)[g_c + c], count) : A(0);
    });
    const auto apply = [&](int64_t at, Shape shape, int64_t stride, int64_t row) {
      backward_tile(at, stride, shape, coefficients, item.mask(walk, const_cast<uint8_t*>(f.mask), row));
    };
    item.for_each_tile(walk, apply);
  }
}

// ---- by dtype ----

// function<T>(arguments) with the element type that dtype names.
#define BNFUSE_BY_DTYPE(dtype, function, ...)                           \
  switch (dtype) {                                                      \
    case DType::float32: return function<float>(__VA_ARGS__);           \
    case DType::float64: return function<double>(__VA_ARGS__);          \
    case DType::bfloat16: return function<BFloat16>(__VA_ARGS__);       \
    case DType::float16: return function<Half>(__VA_ARGS__);            \
  }

void forward_planes(const Forward& f, const PlaneWalk& walk, int64_t begin, int64_t end) {
  BNFUSE_BY_DTYPE(f.dtype, forward_planes_of, f, walk, begin, end)
}

void forward_columns(const Forward& f, const ColumnWalk& walk, int64_t begin, int64_t end) {
  BNFUSE_BY_DTYPE(f.dtype, forward_columns_of, f, walk, begin, end)
}

void backward_planes(const Backward& f, int64_t begin, int64_t end) {
  BNFUSE_BY_DTYPE(f.dtype, backward_planes_of, f, begin, end)
}

void backward_columns(const Backward& f, const ColumnWalk& walk, int64_t begin, int64_t end) {
  BNFUSE_BY_DTYPE(f.dtype, backward_columns_of, f, walk, begin, end)
}

#undef BNFUSE_BY_DTYPE

}  // namespace

const Kernels BNFUSE_KERNELS = {BNFUSE_INSTRUCTION_SET, forward_planes, forward_columns, backward_planes, backward_columns};

}  // namespace bnfuse
