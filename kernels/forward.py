"""The forward pass: y = act(scale·x + shift (+ residual)) and the moments of x, each element read once and written once.

Two launches. The first walks x tile by tile, writes y, and leaves every chunk's moments behind; the second pools a group's
chunks in a fixed order and in float64. Given targets, the second also finds the distance and its gradient. Nothing is added up
by atomics: the counters tell who comes last, not what the sum is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfuse import reference
from bnfuse.errors import InputError

from . import boundary, tuning
from .activations import activation, on_upper_slope
from .distances import channel_terms, load_target, site_distance, store_coefficients
from .tiles import find_chunk, find_group, moments_about, pack_bits, pool_moments, update_moments

# Statistics are read once a program. How they are aligned must not decide how tiles lie, and so in which order sums run.
SMALL = (
    "scale_ptr",
    "shift_ptr",
    "group_starts_ptr",
    "partial_mean_ptr",
    "partial_var_ptr",
    "counters_ptr",
)


@triton.jit
def _bn_act(x, residual_ptr, tile, valid, scale, shift, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(z), and z, of a tile of x."""
    z = x * scale + shift
    if residual_ptr is not None:
        z += tl.load(residual_ptr + tile, mask=valid, other=0.0).to(x.dtype)
    return activation(z, ACT, SLOPE), z


@triton.jit
def _reset(counters_ptr, groups, GROUPS: tl.constexpr):
    """Sets the counters of the launch that follows to 0: each call sees to its own, whatever became of the one before."""
    if counters_ptr is not None:
        if tl.program_id(0) == 0:
            index = tl.arange(0, 2 * GROUPS)
            tl.store(counters_ptr + index, tl.zeros_like(index), mask=index <= groups)


@triton.jit(
    do_not_specialize=("groups", "batch", "sample_rows", "channel_units", "chunk_rows"),
    do_not_specialize_on_alignment=SMALL,
)
def forward_rows(
    x_ptr,  # [rows, C]
    residual_ptr,  # [rows, C] or None
    scale_ptr,  # [C]; None without y
    shift_ptr,  # [C]
    group_starts_ptr,  # int64 [G + 1]
    y_ptr,  # [rows, C], or None for the moments alone
    mask_ptr,  # uint8 [rows, ⌈C / 8⌉] or None
    partial_mean_ptr,  # [chunks, C]
    partial_var_ptr,  # [chunks, C]
    counters_ptr,  # int32 [G + 1] or None
    groups,
    batch,  # N
    sample_rows,  # rows a sample
    channel_units,  # C / UNIT
    chunk_rows,
    share,  # see update_moments
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    UNIT: tl.constexpr,  # divides C: so the compiler knows how far rows are aligned
    GROUPS: tl.constexpr,  # a power of two, at least G
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program walks one chunk of rows in one tile of channels."""
    _reset(counters_ptr, groups, GROUPS)
    accumulator: tl.constexpr = partial_mean_ptr.dtype.element_ty
    channels = channel_units * UNIT
    channel_tiles = tl.cdiv(channels, COLUMNS)
    chunk = tl.program_id(0).to(tl.int64) // channel_tiles
    first_channel = (tl.program_id(0) % channel_tiles) * COLUMNS
    _, first, stop, _ = find_chunk(chunk, group_starts_ptr, groups, batch, sample_rows, chunk_rows, GROUPS)
    if first >= stop:
        return

    row, column = tl.arange(0, ROWS), first_channel + tl.arange(0, COLUMNS)
    in_channels = column < channels
    tile = row[:, None] * channels + column[None, :]
    rows = (stop - first).to(tl.int32)
    pivot = tl.load(x_ptr + first * channels + column, mask=in_channels, other=0.0).to(tl.float64)  # [COLUMNS]
    if y_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=in_channels, other=0.0)[None, :]
        shift = tl.load(shift_ptr + column, mask=in_channels, other=0.0)[None, :]

    mean = tl.zeros((ROWS, COLUMNS), accumulator)
    m2 = tl.zeros((ROWS, COLUMNS), accumulator)
    for i in tl.range(0, tl.cdiv(rows, ROWS), num_stages=STAGES):
        base = (first + i * ROWS) * channels
        in_rows = row < rows - i * ROWS  # [ROWS]
        valid = in_rows[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + base + tile, mask=valid, other=0.0).to(accumulator)
        if y_ptr is not None:
            residual = residual_ptr + base if residual_ptr is not None else None
            y, z = _bn_act(x, residual, tile, valid, scale, shift, ACT, SLOPE)
            tl.store(y_ptr + base + tile, y.to(y_ptr.dtype.element_ty), mask=valid)
            if mask_ptr is not None:
                octet = first_channel // 8 + tl.arange(0, COLUMNS // 8)
                row_octets = tl.cdiv(channels, 8)
                at = (first + i * ROWS) * row_octets + row[:, None] * row_octets + octet[None, :]
                octets = pack_bits(on_upper_slope(z, ACT) & valid, ROWS, COLUMNS)
                tl.store(mask_ptr + at, octets, mask=in_rows[:, None] & (octet < row_octets)[None, :])
        inverse = tl.where(in_rows, tl.full((), 1.0, accumulator) / (i + 1), 0.0)
        mean, m2 = update_moments(mean, m2, x, inverse[:, None], tl.where(in_rows, share, 0.0)[:, None])

    count = tl.maximum((rows - row + ROWS - 1) // ROWS, 0).to(tl.float64)  # [ROWS]
    pooled_mean, pooled_m2 = pool_moments(mean, m2.to(tl.float64) / share, count[:, None], pivot, 0)
    at = chunk * channels + column
    tl.store(partial_mean_ptr + at, pooled_mean.to(accumulator), mask=in_channels)
    tl.store(partial_var_ptr + at, (pooled_m2 / rows).to(accumulator), mask=in_channels)


@triton.jit(
    do_not_specialize=("groups", "batch", "channels", "plane_units", "chunk_samples", "segment_tiles", "segments"),
    do_not_specialize_on_alignment=SMALL,
)
def forward_planes(
    x_ptr,  # [N, C, L]
    residual_ptr,  # [N, C, L] or None
    scale_ptr,  # [C]; None without y
    shift_ptr,  # [C]
    group_starts_ptr,  # int64 [G + 1]
    y_ptr,  # [N, C, L], or None for the moments alone
    mask_ptr,  # uint8 [N·C, ⌈L / 8⌉] or None
    partial_mean_ptr,  # [chunks, segments, C]
    partial_var_ptr,  # [chunks, segments, C]
    counters_ptr,  # int32 [G + 1] or None
    groups,
    batch,  # N
    channels,
    plane_units,  # L / UNIT
    chunk_samples,
    segment_tiles,  # a segment of a plane is so many tiles long
    segments,
    share,  # see update_moments
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    UNIT: tl.constexpr,  # divides L: so the compiler knows how far planes are aligned
    GROUPS: tl.constexpr,  # a power of two, at least G
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program walks one segment of the planes of one tile of channels, in each sample of one chunk."""
    _reset(counters_ptr, groups, GROUPS)
    accumulator: tl.constexpr = partial_mean_ptr.dtype.element_ty
    plane = plane_units * UNIT
    channel_tiles = tl.cdiv(channels, ROWS)
    part = tl.program_id(0).to(tl.int64) // channel_tiles
    chunk, segment = part // segments, part % segments
    _, first, stop, _ = find_chunk(chunk, group_starts_ptr, groups, batch, 1, chunk_samples, GROUPS)
    if first >= stop:
        return

    channel = (tl.program_id(0) % channel_tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_channels = channel < channels
    begin = segment * segment_tiles * COLUMNS
    length = tl.minimum(segment_tiles * COLUMNS, plane - begin).to(tl.int32)
    samples = (stop - first).to(tl.int32)
    # Whole tiles of all samples come first, then what is left of each: so all elements of a tile have seen as many values.
    whole = length // COLUMNS
    rest = length - whole * COLUMNS
    wholes = samples * whole
    tile = channel.to(tl.int64)[:, None] * plane + column[None, :]
    pivot = tl.load(x_ptr + first * channels * plane + channel.to(tl.int64) * plane + begin, mask=in_channels, other=0.0)
    if y_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=in_channels, other=0.0)[:, None]
        shift = tl.load(shift_ptr + channel, mask=in_channels, other=0.0)[:, None]

    mean = tl.zeros((ROWS, COLUMNS), accumulator)
    m2 = tl.zeros((ROWS, COLUMNS), accumulator)
    for i in tl.range(0, wholes + tl.where(rest > 0, samples, 0), num_stages=STAGES):
        sample = first + tl.where(i < wholes, i // tl.maximum(whole, 1), i - wholes)
        start = tl.where(i < wholes, i % tl.maximum(whole, 1), whole) * COLUMNS  # in the segment
        base = sample * channels * plane + begin + start
        in_plane = column < length - start  # [COLUMNS]
        valid = in_channels[:, None] & in_plane[None, :]
        x = tl.load(x_ptr + base + tile, mask=valid, other=0.0).to(accumulator)
        if y_ptr is not None:
            residual = residual_ptr + base if residual_ptr is not None else None
            y, z = _bn_act(x, residual, tile, valid, scale, shift, ACT, SLOPE)
            tl.store(y_ptr + base + tile, y.to(y_ptr.dtype.element_ty), mask=valid)
            if mask_ptr is not None:
                octet = (begin + start) // 8 + tl.arange(0, COLUMNS // 8)
                row_octets = tl.cdiv(plane, 8)
                at = (sample * channels + channel)[:, None] * row_octets + octet[None, :]
                octets = pack_bits(on_upper_slope(z, ACT) & valid, ROWS, COLUMNS)
                tl.store(mask_ptr + at, octets, mask=in_channels[:, None] & (octet < row_octets)[None, :])
        inverse = tl.where(in_plane, tl.full((), 1.0, accumulator) / (i + 1), 0.0)
        mean, m2 = update_moments(mean, m2, x, inverse[None, :], tl.where(in_plane, share, 0.0)[None, :])

    count = (wholes + tl.where(column < rest, samples, 0)).to(tl.float64)  # [COLUMNS]
    pooled_mean, pooled_m2 = pool_moments(mean, m2.to(tl.float64) / share, count[None, :], pivot.to(tl.float64), 1)
    at = part * channels + channel
    tl.store(partial_mean_ptr + at, pooled_mean.to(accumulator), mask=in_channels)
    tl.store(partial_var_ptr + at, (pooled_m2 / (samples.to(tl.float64) * length)).to(accumulator), mask=in_channels)


# Of the integers `segments` alone is compiled in where it is 1, as for rows and most planes: no index is divided by it then.
@triton.jit(
    do_not_specialize=(
        *("groups", "batch", "channels", "sample_units", "chunk_units", "most_chunks", "segment", "plane"),
        *("targets", "mean_stride", "var_stride"),
    ),
    do_not_specialize_on_alignment=("group_starts_ptr", "target_mean_ptr", "target_var_ptr", "classes_ptr"),
)
def finish(
    partial_mean_ptr,  # [chunks, segments, C]
    partial_var_ptr,  # [chunks, segments, C]
    group_starts_ptr,  # int64 [G + 1]
    mean_ptr,  # [G, C]
    var_ptr,  # [G, C]
    groups,
    batch,  # N
    channels,
    sample_units,
    chunk_units,
    most_chunks,  # of all groups: of so many there are partial moments
    segments,
    segment,  # elements of a plane's segment, of `plane`; for rows both are 1
    plane,
    # with targets; otherwise all are None
    target_mean_ptr,  # [K, C], rows mean_stride apart
    target_var_ptr,  # [K, C], rows var_stride apart
    classes_ptr,  # int64 [G], or None where K is 1
    loss_ptr,  # scalar
    dmean_ptr,  # [G, C]
    dvar_ptr,  # [G, C]
    sums_ptr,  # float64 [G, channel_tiles, 2]
    distances_ptr,  # float64 [G]
    counters_ptr,  # int32 [G + 1], 0
    targets,  # K
    mean_stride,
    var_stride,
    weight: tl.float64,
    eps: tl.float64,
    slack: tl.float64,
    mean_weight: tl.float64,
    var_weight: tl.float64,
    DISTANCE: tl.constexpr,
    USE_STD: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, at least G
    TILES: tl.constexpr,  # a power of two, at least channel_tiles
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program pools the chunks of one group in one tile of channels.

    With targets, the last of a group's programs goes on with its distance and coefficients, and the last of all with the loss.
    """
    channel_tiles = tl.cdiv(channels, COLUMNS)
    group, channel_tile = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    first, units = find_group(group, group_starts_ptr, groups, batch, sample_units, chunk_units, most_chunks, GROUPS)
    parts = (tl.cdiv(units, chunk_units) * segments).to(tl.int32)
    channel = channel_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_channels = channel < channels
    base = first * segments * channels
    pivot = tl.load(partial_mean_ptr + base + channel, mask=in_channels & (parts > 0), other=0.0).to(tl.float64)

    count = tl.zeros((ROWS,), tl.float64)
    linear = tl.zeros((ROWS, COLUMNS), tl.float64)
    square = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in tl.range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        chunk = part // segments
        part_units = tl.minimum(chunk_units, units - chunk.to(tl.int64) * chunk_units)
        size = part_units * tl.minimum(segment, plane - (part - chunk * segments) * segment)
        size = tl.where(part < parts, size, 0).to(tl.float64)
        valid = (part < parts)[:, None] & in_channels[None, :]
        at = base + part.to(tl.int64)[:, None] * channels + channel[None, :]
        mean = tl.load(partial_mean_ptr + at, mask=valid, other=0.0).to(tl.float64)
        var = tl.load(partial_var_ptr + at, mask=valid, other=0.0).to(tl.float64)
        delta = tl.where(valid, mean - pivot[None, :], 0.0)
        count += size
        linear += size[:, None] * delta
        square += size[:, None] * (var + delta * delta)
    total = tl.sum(count, 0)
    pooled_mean, pooled_m2 = moments_about(pivot, tl.sum(linear, 0), tl.sum(square, 0), total)
    mean = pooled_mean.to(mean_ptr.dtype.element_ty)
    var = (pooled_m2 / tl.maximum(total, 1.0)).to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + group * channels + channel, mean, mask=in_channels)
    tl.store(var_ptr + group * channels + channel, var, mask=in_channels)

    if DISTANCE is not None:
        row = group * 0
        if classes_ptr is not None:
            row = tl.load(classes_ptr + group)
        has_target = (row >= 0) & (row < targets)
        target_mean_ptr += row * mean_stride
        target_var_ptr += row * var_stride
        target_mean = load_target(target_mean_ptr + channel, in_channels & has_target)
        target_var = load_target(target_var_ptr + channel, in_channels & has_target)
        mean_terms, var_terms = channel_terms(
            mean.to(tl.float64), var.to(tl.float64), target_mean, target_var, eps, slack, DISTANCE, USE_STD
        )
        at = (group * channel_tiles + channel_tile) * 2
        tl.store(sums_ptr + at, tl.sum(tl.where(in_channels, mean_terms, 0.0), 0))
        tl.store(sums_ptr + at + 1, tl.sum(tl.where(in_channels, var_terms, 0.0), 0))
        tl.debug_barrier()  # all of this program's stores, before it is counted
        if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel") == channel_tiles - 1:
            tl.debug_barrier()
            tiles = tl.arange(0, TILES)
            at = sums_ptr + (group * channel_tiles + tiles) * 2
            # What other programs wrote is read where they wrote it to, in L2 (".cg").
            mean_sum = tl.sum(tl.load(at, mask=tiles < channel_tiles, other=0.0, cache_modifier=".cg"), 0)
            var_sum = tl.sum(tl.load(at + 1, mask=tiles < channel_tiles, other=0.0, cache_modifier=".cg"), 0)
            share = (tl.zeros((), tl.float64) + weight) / groups  # a plain float, when interpreted, would be a float32 here
            at = group * channels
            store_coefficients(
                mean_ptr + at,
                var_ptr + at,
                target_mean_ptr,
                target_var_ptr,
                dmean_ptr + at,
                dvar_ptr + at,
                has_target,
                share,
                mean_sum,
                var_sum,
                channels,
                eps,
                slack,
                mean_weight,
                var_weight,
                DISTANCE,
                USE_STD,
                BLOCK,
            )
            distance = site_distance(mean_sum, var_sum, channels, mean_weight, var_weight, DISTANCE)
            tl.store(distances_ptr + group, distance)
            tl.debug_barrier()
            if tl.atomic_add(counters_ptr + groups, 1, sem="acq_rel") == groups - 1:
                tl.debug_barrier()
                index = tl.arange(0, GROUPS)
                distances = tl.load(distances_ptr + index, mask=index < groups, other=0.0, cache_modifier=".cg")
                tl.store(loss_ptr, (share * tl.sum(distances, 0)).to(loss_ptr.dtype.element_ty))


@dataclass(frozen=True)
class _Targets:
    """The targets of one site, and how to measure the distance from them."""

    mean: Tensor | None = None  # [K, C]
    var: Tensor | None = None  # [K, C]
    classes: Tensor | None = None  # int64 [G]
    weight: float = 1.0
    distance: str | None = None
    use_std: bool = False
    eps: float = 0.0
    slack: float = 0.0
    mean_weight: float = 1.0
    var_weight: float = 1.0


def _run_forward(
    config: tuning.Config,
    walk: boundary.Walk,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    group_starts: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    act: str,
    slope: float,
    targets: _Targets | None = None,
) -> tuple[Tensor, ...]:
    """Both launches; fills y and mask where there are such. Returns mean, var, and with targets loss, dmean, dvar."""
    work = tuning.cut(walk, config)
    pool = tuning.pooling(walk, work)
    channel_tiles = triton.cdiv(walk.channels, pool.columns)
    moments = {"dtype": reference.moment_dtype(x.dtype), "device": x.device}
    shape = walk.groups, walk.channels
    partial_mean, partial_var = (torch.empty(work.parts, walk.channels, **moments) for _ in range(2))
    mean, var = (torch.empty(shape, **moments) for _ in range(2))
    loss = dmean = dvar = sums = distances = counters = None
    if targets is not None:
        loss, dmean, dvar = torch.empty((), **moments), torch.empty(shape, **moments), torch.empty(shape, **moments)
        sums = torch.empty(walk.groups, channel_tiles, 2, dtype=torch.float64, device=x.device)
        distances = torch.empty(walk.groups, dtype=torch.float64, device=x.device)
        # The walk resets the counters; where there is nothing to walk, nobody else would.
        allocate = torch.empty if x.numel() else torch.zeros
        counters = allocate(walk.groups + 1, dtype=torch.int32, device=x.device)
    boundary.launch(
        forward_planes if walk.planes else forward_rows,
        work.programs if x.numel() else 0,
        x,
        residual,
        scale,
        shift,
        group_starts,
        y,
        mask,
        partial_mean,
        partial_var,
        counters,
        walk.groups,
        *tuning.walk_arguments(walk, work),
        work.share,
        ACT=act,
        SLOPE=slope,
        UNIT=walk.unit,
        GROUPS=walk.group_width,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    target = targets or _Targets()
    boundary.launch(
        finish,
        walk.groups * channel_tiles,
        partial_mean,
        partial_var,
        group_starts,
        mean,
        var,
        walk.groups,
        walk.samples,
        walk.channels,
        walk.sample_units,
        work.chunk_units,
        work.chunks,
        work.segments,
        work.segment_tiles * config.columns if walk.planes else 1,
        walk.plane if walk.planes else 1,
        target.mean,
        target.var,
        target.classes,
        loss,
        dmean,
        dvar,
        sums,
        distances,
        counters,
        1 if target.mean is None else len(target.mean),
        0 if target.mean is None else target.mean.stride(0),
        0 if target.var is None else target.var.stride(0),
        target.weight,
        target.eps,
        target.slack,
        target.mean_weight,
        target.var_weight,
        DISTANCE=target.distance,
        USE_STD=target.use_std,
        GROUPS=walk.group_width,
        TILES=triton.next_power_of_2(max(1, channel_tiles)),
        ROWS=pool.rows,
        COLUMNS=pool.columns,
        BLOCK=pool.block,
        num_warps=4,
    )
    return (mean, var) if targets is None else (mean, var, loss, dmean, dvar)


def _bn_forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    group_starts: Tensor,
    act: str,
    slope: float,
    walk: boundary.Walk,
    targets: _Targets | None = None,
) -> tuple[Tensor, ...]:
    boundary.check_choice("act", act, reference.ACTIVATIONS)
    boundary.check_like_x("residual", residual, x)
    scale = boundary.check_statistics("scale", scale, x, (walk.channels,))
    shift = boundary.check_statistics("shift", shift, x, (walk.channels,))
    y = torch.empty_like(x)
    needs_mask = reference.needs_mask(residual is not None, act)
    mask = torch.empty(reference.mask_shape(x) if needs_mask else 0, dtype=torch.uint8, device=x.device)
    x, residual = boundary.aligned(x), boundary.aligned(residual)

    def run(config: tuning.Config) -> tuple[Tensor, ...]:
        bits = mask if needs_mask else None
        return _run_forward(config, walk, x, residual, scale, shift, group_starts.contiguous(), y, bits, act, slope, targets)

    mean, var, *more = run(tuning.choose(f"forward_{walk.layout}", walk, run))
    return y, mean, var, mask, *more


def bn_forward(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, group_starts: Tensor, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bnfuse.reference.bn_forward`: y, mean, var, mask.

    Parameters
    ----------
    x : [N, C, *spatial], contiguous or channels_last; float32, bfloat16, float16 or float64
    residual : with x's dtype and strides, or None
    scale, shift : [C], float32 (float64 for float64 x)
    group_starts : int64 [G + 1], non-decreasing from 0 to N, which nobody checks here: the host does not see its values.
        Others give undefined results, and lead to no memory outside of x's.

    Raises
    ------
    InputError : a device, dtype, shape or layout that does not fit
    """
    return _bn_forward(x, residual, scale, shift, group_starts, act, slope, boundary.check_x(x, group_starts))


def bn_forward_with_targets(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    group_starts: Tensor,
    target_mean: Tensor,
    target_var: Tensor,
    classes: Tensor | None,
    weight: float,
    act: str,
    slope: float,
    distance: str,
    use_std: bool,
    eps: float,
    slack: float,
    mean_weight: float,
    var_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`bn_forward`, and in the same two launches this one site's loss and its gradient by the moments.

    ``loss = weight · mean over groups g of distance(moments[g], targets[classes[g]])``: `bnfuse.reference.bn_loss` of one site.

    Parameters
    ----------
    target_mean, target_var : [K, C] in the moments' dtype; rows may be any distance apart, as in a slice of all sites' targets
    classes : int64 [G], or None where K is 1. A class out of range makes the loss NaN: nothing on the host sees its value.
    distance, use_std, eps, slack, mean_weight, var_weight : see `bnfuse.reference.bn_distance`

    Returns
    -------
    y, mean, var, mask : as from `bn_forward`, bit by bit
    loss : scalar; dmean, dvar : [G, C], ∂loss/∂mean and ∂loss/∂var
    """
    walk = boundary.check_x(x, group_starts)
    boundary.check_choice("distance", distance, reference.DISTANCES)
    dtype = reference.moment_dtype(x.dtype)
    if target_mean.dim() != 2:
        raise InputError(f"target_mean must be [K, {walk.channels}], got {boundary.describe(target_mean)}")
    table = len(target_mean), walk.channels
    targets = _Targets(
        boundary.check_table("target_mean", target_mean, dtype, table, x.device),
        boundary.check_table("target_var", target_var, dtype, table, x.device),
        boundary.check_classes(classes, walk.groups, table[0], x.device),
        weight,
        distance,
        use_std,
        eps,
        slack,
        mean_weight,
        var_weight,
    )
    return _bn_forward(x, residual, scale, shift, group_starts, act, slope, walk, targets)


def group_moments(x: Tensor, group_starts: Tensor) -> tuple[Tensor, Tensor]:
    """`bnfuse.reference.group_moments`: mean and var [G, C], the bits that `bn_forward` finds. Arguments and errors are its."""
    walk = boundary.check_x(x, group_starts)
    x, group_starts = boundary.aligned(x), group_starts.contiguous()

    def run(config: tuning.Config) -> tuple[Tensor, ...]:
        return _run_forward(config, walk, x, None, None, None, group_starts, None, None, "identity", 0.0)

    return run(tuning.choose(f"forward_{walk.layout}", walk, run))
