"""What the kernels do with tiles: find their share of the work, take moments, pack and unpack mask bits.

Work is cut along *units*: rows of C channels where x is channels_last, whole samples where it is planes. Every group's units
are cut into chunks, so that no chunk holds two groups. Where groups start is known on the device alone: the host launches for
the most chunks there can be, each program finds its own here, and those left over end.

Moments are Welford's, in every element of the tile by itself: no sum over the tile until a program has seen its whole share,
no subtraction of large sums, no value that stands for a mean before the mean is known.
"""

import triton
import triton.language as tl


@triton.jit
def clamp_units(begin, end, batch, sample_units):
    """The units of a group's samples. Starts that do not fit x, which the host cannot see, lead nowhere outside of it."""
    begin = tl.minimum(tl.maximum(begin, 0), batch)
    end = tl.minimum(tl.maximum(end, begin), batch)
    return begin * sample_units, end * sample_units


@triton.jit
def group_units(group_starts_ptr, groups, batch, sample_units, GROUPS: tl.constexpr):
    """First and last unit (exclusive) of every group, int64 [GROUPS]; those beyond `groups` are empty."""
    group = tl.arange(0, GROUPS)
    exists = group < groups
    begin = tl.load(group_starts_ptr + group, mask=exists, other=0)
    end = tl.load(group_starts_ptr + group + 1, mask=exists, other=0)
    return clamp_units(begin, end, batch, sample_units)


@triton.jit
def find_chunk(chunk, group_starts_ptr, groups, batch, sample_units, chunk_units, GROUPS: tl.constexpr):
    """The chunk's group, the units [first, stop) it holds (none, if it does not exist), and the units of the group."""
    if GROUPS == 1:
        begin, end = clamp_units(tl.load(group_starts_ptr), tl.load(group_starts_ptr + 1), batch, sample_units)
        first = begin + chunk * chunk_units
        return 0, first, tl.minimum(first + chunk_units, end), end - begin
    else:
        begin, end = group_units(group_starts_ptr, groups, batch, sample_units, GROUPS)
        chunks = (end - begin + chunk_units - 1) // chunk_units  # [GROUPS]
        through = tl.cumsum(chunks, 0)  # with those of all earlier groups
        group = tl.sum((through <= chunk).to(tl.int32), 0)
        mine = tl.arange(0, GROUPS) == group
        first = tl.sum(tl.where(mine, begin + (chunk - through + chunks) * chunk_units, 0), 0)
        stop = tl.minimum(first + chunk_units, tl.sum(tl.where(mine, end, 0), 0))
        return group, first, stop, tl.sum(tl.where(mine, end - begin, 0), 0)


@triton.jit
def find_group(group, group_starts_ptr, groups, batch, sample_units, chunk_units, most_chunks, GROUPS: tl.constexpr):
    """The group's first chunk, and its units: no more than there are chunks for, should groups overlap."""
    begin, end = group_units(group_starts_ptr, groups, batch, sample_units, GROUPS)
    chunks = (end - begin + chunk_units - 1) // chunk_units  # [GROUPS]
    index = tl.arange(0, GROUPS)
    units = tl.sum(tl.where(index == group, end - begin, 0), 0)
    first = tl.minimum(tl.sum(tl.where(index < group, chunks, 0), 0), most_chunks)
    return first, tl.minimum(units, (most_chunks - first) * chunk_units)


# ---- moments ----


@triton.jit
def update_moments(mean, m2, x, inverse, share):
    """Takes one more x into each element's mean and m2 = Σ(x − mean)²·share, `inverse` being one over their number with it.

    A place of the tile that holds no element has inverse and share 0, and x 0. The share is a power of two, at most one over
    the number of elements at last: m2 overflows only where the variance does.
    """
    delta = x - mean
    mean += delta * inverse
    m2 += delta * share * (x - mean)
    return mean, m2


@triton.jit
def pool_moments(mean, m2, count, pivot, AXIS: tl.constexpr):
    """(mean, m2) of all elements along an axis from those of its parts, in float64; `pivot` lacks the axis.

    Chan's merge of any number of parts at once, about a pivot, which may be any value of the data: in float64 the difference of
    the sums loses nothing that float32 could hold. A part without elements has m2 0, and any finite mean.
    """
    delta = tl.where(count > 0, mean.to(tl.float64) - tl.expand_dims(pivot, AXIS), 0.0)
    linear = tl.sum(count * delta, AXIS)
    square = tl.sum(m2 + count * delta * delta, AXIS)
    return moments_about(pivot, linear, square, tl.sum(count, AXIS))


@triton.jit
def moments_about(pivot, linear, square, count):
    """(mean, m2) from Σ(x − pivot) and Σ(x − pivot)² of `count` elements."""
    inverse = 1.0 / tl.maximum(count, 1.0)
    m2 = square - linear * linear * inverse
    return pivot + linear * inverse, tl.where(m2 < 0, 0.0, m2)  # rounding alone makes it negative; NaN stays


# ---- the mask: bit j of byte i in a row is the row's element 8i + j ----


@triton.jit
def pack_bits(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS] → uint8 [ROWS, COLUMNS / 8]."""
    octets = tl.reshape(bits.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(octets << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(octets, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """uint8 [ROWS, COLUMNS / 8] → bool [ROWS, COLUMNS]."""
    bits = (octets.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
