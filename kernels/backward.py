"""The backward pass: dx = scale·act'·dy + ∂L/∂mean / M + 2·∂L/∂var·(x − mean) / M, and d residual = act'·dy, in one launch.

dy and x are read once, dx is written once, and may take dy's place. What an absent gradient does not need is not read: without
∂L/∂var, x matters only where act' must be had from it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfuse import reference

from . import boundary, tuning
from .activations import derivative, two_slopes
from .tiles import find_chunk, unpack_bits

SMALL = ("scale_ptr", "shift_ptr", "mean_ptr", "dmean_ptr", "dvar_ptr", "group_starts_ptr")


@triton.jit
def _coefficients(mean_ptr, dmean_ptr, dvar_ptr, at, valid, count):
    """mean, ∂L/∂mean / M and 2·∂L/∂var / M of some channels of a group; 0 for what is absent."""
    mean = tl.load(mean_ptr + at, mask=valid, other=0.0)
    constant = tl.zeros_like(mean)
    linear = tl.zeros_like(mean)
    if dmean_ptr is not None:
        constant = tl.load(dmean_ptr + at, mask=valid, other=0.0) / count
    if dvar_ptr is not None:
        linear = 2 * tl.load(dvar_ptr + at, mask=valid, other=0.0) / count
    return mean, constant, linear


@triton.jit
def _gradient(
    dy_ptr,
    x_ptr,
    residual_ptr,
    base,
    tile,
    valid,
    upper,  # the mask's bits, or None
    scale,
    shift,
    mean,
    constant,
    linear,
    dx_ptr,
    dresidual_ptr,
    dvar_ptr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    accumulator: tl.constexpr,
):
    """One tile of dx, and of d residual where there is one."""
    from_x: tl.constexpr = dy_ptr is not None and upper is None and ACT != "identity"
    dx = constant
    if from_x or dvar_ptr is not None:
        x = tl.load(x_ptr + base + tile, mask=valid, other=0.0).to(accumulator)
    if dvar_ptr is not None:
        dx += linear * (x - mean)
    if dy_ptr is not None:
        dz = tl.load(dy_ptr + base + tile, mask=valid, other=0.0).to(accumulator)
        if upper is not None:
            dz *= two_slopes(upper, ACT, SLOPE, accumulator)
        elif from_x:
            z = x * scale + shift
            if residual_ptr is not None:
                z += tl.load(residual_ptr + base + tile, mask=valid, other=0.0).to(accumulator)
            dz *= derivative(z, ACT, SLOPE)
        dx += scale * dz
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + base + tile, dz.to(dresidual_ptr.dtype.element_ty), mask=valid)
    elif dresidual_ptr is not None:
        tl.store(dresidual_ptr + base + tile, tl.zeros(tile.shape, dresidual_ptr.dtype.element_ty), mask=valid)
    dx = dx + tl.zeros(tile.shape, accumulator)
    tl.store(dx_ptr + base + tile, dx.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _row_octets(mask_ptr, first, row, rows, first_channel, channels, COLUMNS: tl.constexpr):
    """The mask of the tile whose first row is the chunk's `first`, rows at and beyond `rows` of it left out."""
    octet = first_channel // 8 + tl.arange(0, COLUMNS // 8)
    row_octets = tl.cdiv(channels, 8)
    at = row[:, None] * row_octets + octet[None, :]
    return tl.load(mask_ptr + first * row_octets + at, mask=(row < rows)[:, None] & (octet < row_octets)[None, :], other=0)


@triton.jit
def _plane_octets(mask_ptr, plane_row, begin, plane, valid, COLUMNS: tl.constexpr):
    """The mask of the tile that starts at position `begin` of the planes `plane_row`."""
    octet = begin // 8 + tl.arange(0, COLUMNS // 8)
    row_octets = tl.cdiv(plane, 8)
    at = plane_row[:, None] * row_octets + octet[None, :]
    return tl.load(mask_ptr + at, mask=valid[:, None] & (octet < row_octets)[None, :], other=0)


@triton.jit(
    do_not_specialize=("groups", "batch", "sample_rows", "channel_units", "chunk_rows"),
    do_not_specialize_on_alignment=SMALL,
)
def backward_rows(
    dy_ptr,  # [rows, C] or None
    x_ptr,  # [rows, C]
    residual_ptr,  # [rows, C] or None
    mask_ptr,  # uint8 [rows, ⌈C / 8⌉] or None
    scale_ptr,  # [C]; None without dy
    shift_ptr,  # [C]; None without dy
    mean_ptr,  # [G, C]
    dmean_ptr,  # [G, C] or None
    dvar_ptr,  # [G, C] or None
    group_starts_ptr,  # int64 [G + 1]
    dx_ptr,  # [rows, C]; may be dy
    dresidual_ptr,  # [rows, C] or None
    groups,
    batch,  # N
    sample_rows,  # rows a sample
    channel_units,  # C / UNIT
    chunk_rows,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    UNIT: tl.constexpr,  # divides C: so the compiler knows how far rows are aligned
    GROUPS: tl.constexpr,  # a power of two, at least G
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program walks one chunk of rows in one tile of channels."""
    accumulator: tl.constexpr = mean_ptr.dtype.element_ty
    channels = channel_units * UNIT
    channel_tiles = tl.cdiv(channels, COLUMNS)
    chunk = tl.program_id(0).to(tl.int64) // channel_tiles
    first_channel = (tl.program_id(0) % channel_tiles) * COLUMNS
    group, first, stop, units = find_chunk(chunk, group_starts_ptr, groups, batch, sample_rows, chunk_rows, GROUPS)
    if first >= stop:
        return

    row, column = tl.arange(0, ROWS), first_channel + tl.arange(0, COLUMNS)
    in_channels = column < channels
    tile = row[:, None] * channels + column[None, :]
    rows = (stop - first).to(tl.int32)
    at = group * channels + column
    mean, constant, linear = _coefficients(mean_ptr, dmean_ptr, dvar_ptr, at, in_channels, units.to(accumulator))
    scale, shift = constant, constant
    if dy_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=in_channels, other=0.0)
        shift = tl.load(shift_ptr + column, mask=in_channels, other=0.0)

    # Bytes of the mask are too narrow for the pipeline: they are read one tile ahead.
    if mask_ptr is not None:
        octets = _row_octets(mask_ptr, first, row, rows, first_channel, channels, COLUMNS)
    for i in tl.range(0, tl.cdiv(rows, ROWS), num_stages=STAGES):
        base = (first + i * ROWS) * channels
        in_rows = row < rows - i * ROWS  # [ROWS]
        upper = None
        if mask_ptr is not None:
            upper = unpack_bits(octets, ROWS, COLUMNS)
            ahead = (i + 1) * ROWS
            octets = _row_octets(mask_ptr, first + ahead, row, rows - ahead, first_channel, channels, COLUMNS)
        _gradient(
            dy_ptr,
            x_ptr,
            residual_ptr,
            base,
            tile,
            in_rows[:, None] & in_channels[None, :],
            upper,
            scale[None, :],
            shift[None, :],
            mean[None, :],
            constant[None, :],
            linear[None, :],
            dx_ptr,
            dresidual_ptr,
            dvar_ptr,
            ACT,
            SLOPE,
            accumulator,
        )


@triton.jit(
    do_not_specialize=("groups", "batch", "channels", "plane_units", "chunk_samples", "segment_tiles", "segments"),
    do_not_specialize_on_alignment=SMALL,
)
def backward_planes(
    dy_ptr,  # [N, C, L] or None
    x_ptr,  # [N, C, L]
    residual_ptr,  # [N, C, L] or None
    mask_ptr,  # uint8 [N·C, ⌈L / 8⌉] or None
    scale_ptr,  # [C]; None without dy
    shift_ptr,  # [C]; None without dy
    mean_ptr,  # [G, C]
    dmean_ptr,  # [G, C] or None
    dvar_ptr,  # [G, C] or None
    group_starts_ptr,  # int64 [G + 1]
    dx_ptr,  # [N, C, L]; may be dy
    dresidual_ptr,  # [N, C, L] or None
    groups,
    batch,  # N
    channels,
    plane_units,  # L / UNIT
    chunk_samples,
    segment_tiles,  # a segment of a plane is so many tiles long
    segments,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    UNIT: tl.constexpr,  # divides L: so the compiler knows how far planes are aligned
    GROUPS: tl.constexpr,  # a power of two, at least G
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program walks one segment of the planes of one tile of channels, in each sample of one chunk."""
    accumulator: tl.constexpr = mean_ptr.dtype.element_ty
    plane = plane_units * UNIT
    channel_tiles = tl.cdiv(channels, ROWS)
    part = tl.program_id(0).to(tl.int64) // channel_tiles
    chunk, segment = part // segments, part % segments
    group, first, stop, units = find_chunk(chunk, group_starts_ptr, groups, batch, 1, chunk_samples, GROUPS)
    if first >= stop:
        return

    channel = (tl.program_id(0) % channel_tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_channels = channel < channels
    begin = segment * segment_tiles * COLUMNS
    length = tl.minimum(segment_tiles * COLUMNS, plane - begin).to(tl.int32)
    sample_tiles = tl.cdiv(length, COLUMNS)
    tile = channel.to(tl.int64)[:, None] * plane + column[None, :]
    at = group * channels + channel
    mean, constant, linear = _coefficients(mean_ptr, dmean_ptr, dvar_ptr, at, in_channels, (units * plane).to(accumulator))
    scale, shift = constant, constant
    if dy_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=in_channels, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=in_channels, other=0.0)

    tiles = (stop - first).to(tl.int32) * sample_tiles
    # Bytes of the mask are too narrow for the pipeline: they are read one tile ahead.
    if mask_ptr is not None:
        octets = _plane_octets(mask_ptr, first * channels + channel, begin, plane, in_channels, COLUMNS)
    for i in tl.range(0, tiles, num_stages=STAGES):
        sample = first + i // sample_tiles
        start = (i % sample_tiles) * COLUMNS  # in the segment
        base = sample * channels * plane + begin + start
        in_plane = column < length - start  # [COLUMNS]
        upper = None
        if mask_ptr is not None:
            upper = unpack_bits(octets, ROWS, COLUMNS)
            ahead = i + 1
            plane_row = (first + ahead // sample_tiles) * channels + channel
            next_begin = begin + (ahead % sample_tiles) * COLUMNS
            octets = _plane_octets(mask_ptr, plane_row, next_begin, plane, in_channels & (ahead < tiles), COLUMNS)
        _gradient(
            dy_ptr,
            x_ptr,
            residual_ptr,
            base,
            tile,
            in_channels[:, None] & in_plane[None, :],
            upper,
            scale[:, None],
            shift[:, None],
            mean[:, None],
            constant[:, None],
            linear[:, None],
            dx_ptr,
            dresidual_ptr,
            dvar_ptr,
            ACT,
            SLOPE,
            accumulator,
        )


def _run_backward(
    config: tuning.Config,
    walk: boundary.Walk,
    dy: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    group_starts: Tensor,
    act: str,
    slope: float,
    dx: Tensor,
    dresidual: Tensor | None,
) -> None:
    """The launch; fills dx, and dresidual where there is one."""
    work = tuning.cut(walk, config)
    boundary.launch(
        backward_planes if walk.planes else backward_rows,
        work.programs if x.numel() else 0,
        dy,
        x,
        residual,
        mask,
        scale,
        shift,
        mean,
        dmean,
        dvar,
        group_starts,
        dx,
        dresidual,
        walk.groups,
        *tuning.walk_arguments(walk, work),
        ACT=act,
        SLOPE=slope,
        UNIT=walk.unit,
        GROUPS=walk.group_width,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _bn_backward(
    dy: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    group_starts: Tensor,
    act: str,
    slope: float,
    want_dresidual: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    walk = boundary.check_x(x, group_starts)
    boundary.check_choice("act", act, reference.ACTIVATIONS)
    boundary.check_like_x("dy", dy, x)
    boundary.check_like_x("residual", residual, x)
    bits = None
    if mask.numel():
        boundary.check("mask", mask, torch.uint8, reference.mask_shape(x), x.device)
        bits = mask.contiguous()
    scale, shift = (boundary.check_statistics(n, t, x, (walk.channels,)) for n, t in (("scale", scale), ("shift", shift)))
    shape = walk.groups, walk.channels
    moments = [boundary.check_statistics(n, t, x, shape) for n, t in (("mean", mean), ("dmean", dmean), ("dvar", dvar))]
    group_starts = group_starts.contiguous()
    dx = dy if in_place else torch.empty_like(x)
    dresidual = torch.empty_like(x) if want_dresidual else x.new_empty(0)
    given = (dy, x, residual, bits, scale, shift) if dy is not None else (None, x, None, None, None, None)

    def run(config: tuning.Config, dx: Tensor) -> None:
        extra = dresidual if want_dresidual else None
        _run_backward(config, walk, *given, *moments, group_starts, act, slope, dx, extra)

    # While configurations are tried, dx must not take dy's place.
    config = tuning.choose(f"backward_{walk.layout}", walk, lambda config: run(config, torch.empty_like(x) if in_place else dx))
    run(config, dx)
    return dx, dresidual


def bn_backward(
    dy: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    group_starts: Tensor,
    act: str,
    slope: float,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """`bnfuse.reference.bn_backward`: dx, and dresidual ([0] unless `want_dresidual`).

    Parameters
    ----------
    dy, residual : with x's dtype and strides, or None
    mask : as from `bn_forward`; empty where act' is had from x (and the residual)
    mean : [G, C] as from `bn_forward`; dmean, dvar : [G, C] or None
    the others : as for `bn_forward`

    Raises
    ------
    InputError : a device, dtype, shape or layout that does not fit
    """
    return _bn_backward(
        dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual, in_place=False
    )


def bn_backward_(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    group_starts: Tensor,
    act: str,
    slope: float,
    want_dresidual: bool,
) -> Tensor:
    """`bn_backward` whose dx takes dy's place; returns dresidual."""
    return _bn_backward(
        dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual, in_place=True
    )[1]


def group_moments_backward(x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None, group_starts: Tensor) -> Tensor:
    """`bnfuse.reference.group_moments_backward`: dx. Arguments and errors are those of `bn_backward`."""
    walk = boundary.check_x(x, group_starts)
    shape = walk.groups, walk.channels
    moments = [boundary.check_statistics(n, t, x, shape) for n, t in (("mean", mean), ("dmean", dmean), ("dvar", dvar))]
    group_starts, dx = group_starts.contiguous(), torch.empty_like(x)

    def run(config: tuning.Config) -> None:
        _run_backward(config, walk, None, x, *[None] * 4, *moments, group_starts, "identity", 0.0, dx, None)

    run(tuning.choose(f"backward_{walk.layout}", walk, run))
    return dx
