"""The eager definition of every operation: the specification, and the oracle of every test.

Plain PyTorch, differentiable any number of times in reverse mode, on any device and in any dtype, float64 included. Slow and
obvious on purpose: a kernel is right when it agrees with this file in float64. Not for speed, and not the place to check input.

Shapes used throughout: N samples, C channels, S sites, G groups, T = ΣC over all sites. A *group* is a contiguous run of
samples of the batch; group g holds samples ``group_starts[g] : group_starts[g + 1]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "silu", "hardswish")
# Activations whose derivative is one of two constants: one bit an element tells which.
TWO_SLOPE_ACTIVATIONS = ("relu", "relu6", "leaky_relu")
DISTANCES = ("l2", "l2_squared", "mse", "l1", "kl", "hinge")
EAGER_DISTANCES = ("kl_reverse",)  # of moments alone, so that a kernel of their own would gain nothing


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are computed and kept in float32, in float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation(z: Tensor, act: str, slope: float) -> Tensor:
    """act(z), elementwise; `slope` is leaky ReLU's for z < 0."""
    if act == "identity":
        return z
    if act == "leaky_relu":
        return F.leaky_relu(z, slope)
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}[act](z)


def activation_derivative(z: Tensor, act: str, slope: float) -> Tensor:
    """act'(z), elementwise. At a kink it takes PyTorch's value: 0 at z = 0 (relu, relu6) and `slope` (leaky_relu)."""
    if act == "identity":
        return torch.ones_like(z)
    if act == "relu":
        return (z > 0).to(z.dtype)
    if act == "relu6":
        return ((z > 0) & (z < 6)).to(z.dtype)
    if act == "leaky_relu":
        return torch.where(z > 0, torch.ones_like(z), slope)
    if act == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    inner = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))  # hardswish
    return torch.where(z > -3, inner, torch.zeros_like(z))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] → [1, C, 1, …], to broadcast against x [N, C, *spatial]."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def per_sample(values: Tensor, group_starts: Tensor, x: Tensor) -> Tensor:
    """[G, C] → [N, C, 1, …]: each sample gets its group's row."""
    rows = values.repeat_interleave(group_starts.diff(), dim=0, output_size=x.shape[0])
    return rows.reshape(*rows.shape, *[1] * (x.dim() - 2))


def elements_per_channel(group_starts: Tensor, x: Tensor) -> Tensor:
    """[G] M, the number of elements a channel that each group pools: its samples times the spatial size."""
    return group_starts.diff() * (x.numel() // max(1, x.shape[0] * x.shape[1]))


def group_moments(x: Tensor, group_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over each group's samples and positions.

    Parameters
    ----------
    x : [N, C, *spatial]
    group_starts : int64 [G + 1]

    Returns
    -------
    mean, var : [G, C] in `moment_dtype`; an empty group has mean 0 and variance 0
    """
    x = x.to(moment_dtype(x.dtype))
    dims = [0, *range(2, x.dim())]
    starts = group_starts.tolist()
    means, variances = [], []
    for begin, end in zip(starts[:-1], starts[1:]):
        if begin == end or x.numel() == 0:
            var = mean = x.new_zeros(x.shape[1])
        else:
            var, mean = torch.var_mean(x[begin:end], dim=dims, correction=0)
        means.append(mean)
        variances.append(var)
    return torch.stack(means), torch.stack(variances)


def group_moments_backward(x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None, group_starts: Tensor) -> Tensor:
    """``∂L/∂mean / M + 2·∂L/∂var·(x − mean) / M``: [N, C, *spatial] in x's dtype and layout."""
    return torch.empty_like(x).copy_(_moments_gradient(x, mean, dmean, dvar, group_starts))


def _moments_gradient(x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None, group_starts: Tensor) -> Tensor:
    x = x.to(moment_dtype(x.dtype))
    count = elements_per_channel(group_starts, x).clamp(min=1).to(x.dtype)[:, None]  # [G, 1]
    dx = torch.zeros_like(x)
    if dmean is not None:
        dx = dx + per_sample(dmean / count, group_starts, x)
    if dvar is not None:
        dx = dx + per_sample(2 * dvar / count, group_starts, x) * (x - per_sample(mean, group_starts, x))
    return dx


def bn_act(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act: str, slope: float) -> Tensor:
    """act(scale·x + shift (+ residual)), computed in `moment_dtype` and not rounded: [N, C, *spatial]."""
    return activation(_pre_activation(x, residual, scale, shift), act, slope)


def _pre_activation(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    dtype = moment_dtype(x.dtype)
    z = x.to(dtype) * per_channel(scale, x) + per_channel(shift, x)
    return z if residual is None else z + residual.to(dtype)


def bn_forward(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, group_starts: Tensor, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One site: ``y = act(scale·x + shift (+ residual))`` and the moments of x. See `ops.bn_act` for the contract.

    Returns
    -------
    y : [N, C, *spatial], x's dtype and memory layout
    mean, var : [G, C] in `moment_dtype`
    mask : uint8 [rows, bytes], see `pack_mask`; [0] unless `needs_mask`
    """
    z = _pre_activation(x, residual, scale, shift)
    y = torch.empty_like(x).copy_(activation(z, act, slope))
    mean, var = group_moments(x, group_starts)
    mask = x.new_empty(0, dtype=torch.uint8)
    if needs_mask(residual is not None, act):
        mask = pack_mask(activation_derivative(z, act, 0.0) > 0, x)
    return y, mean, var, mask


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
    """``dx = scale·act'·dy + ∂L/∂mean / M + 2·∂L/∂var·(x − mean) / M`` and ``d residual = act'·dy``.

    act' comes from the mask where there is one, otherwise from x (and the residual).

    Returns
    -------
    dx : [N, C, *spatial], x's dtype and layout
    dresidual : the same, or [0] unless `want_dresidual`
    """
    dtype = moment_dtype(x.dtype)
    dx = _moments_gradient(x, mean, dmean, dvar, group_starts)
    dz = torch.zeros_like(dx)
    if dy is not None:
        if mask.numel():
            slope_below = slope if act == "leaky_relu" else 0.0
            derivative = torch.where(unpack_mask(mask, x), torch.ones_like(dz), slope_below)
        else:
            derivative = activation_derivative(_pre_activation(x, residual, scale, shift), act, slope)
        dz = derivative * dy.to(dtype)
        dx = dx + per_channel(scale, x) * dz
    rounded = torch.empty_like(x).copy_(dx)
    return rounded, torch.empty_like(x).copy_(dz) if want_dresidual else x.new_empty(0)


# ---- the mask: one bit an element where act' cannot be had from x alone ----


def needs_mask(has_residual: bool, act: str) -> bool:
    """With a residual, x no longer tells on which side of its kink a two-slope activation stood."""
    return has_residual and act in TWO_SLOPE_ACTIVATIONS


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels walk x [N, C, *spatial] as rows of C channels rather than as planes of one channel.

    One position a plane (7×7 pooled to 1×1, or [N, C]) counts as channels_last: its rows are long, its planes are not.
    """
    return not (x.is_contiguous() and x.numel() > x.shape[0] * x.shape[1])


def row_shape(x: Tensor) -> tuple[int, int]:
    """x in memory order as (rows, length): a row is a position's channels (channels_last) or a channel's plane."""
    n, c = x.shape[:2]
    positions = x.numel() // max(1, n * c)
    return (n * positions, c) if is_channels_last(x) else (n * c, positions)


def mask_shape(x: Tensor) -> tuple[int, int]:
    """The rows of `row_shape`, one bit an element, each row padded to whole bytes."""
    rows, length = row_shape(x)
    return rows, (length + 7) // 8


def pack_mask(bits: Tensor, x: Tensor) -> Tensor:
    """bool [N, C, *spatial] → uint8 `mask_shape(x)`: bit j of byte i in a row is the row's element 8i + j."""
    rows, length = row_shape(x)
    flat = bits.to(torch.uint8)
    flat = flat.movedim(1, -1).reshape(rows, length) if is_channels_last(x) else flat.reshape(rows, length)
    flat = F.pad(flat, (0, -length % 8)).reshape(*mask_shape(x), 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The inverse of `pack_mask`: bool [N, C, *spatial]."""
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.bool().flatten(1)[:, : row_shape(x)[1]]
    n, c, *spatial = x.shape
    return bits.reshape(n, *spatial, c).movedim(-1, 1) if is_channels_last(x) else bits.reshape(x.shape)


# ---- the distance between moments and their targets ----


def bn_distance(
    mean: Tensor,
    var: Tensor,
    target_mean: Tensor,
    target_var: Tensor,
    site_channels: Tensor,
    *,
    distance: str = "l2",
    use_std: bool = False,
    eps: float = 1e-8,
    slack: float = 0.0,
    mean_weight: float = 1.0,
    var_weight: float = 1.0,
) -> Tensor:
    """How far each group's moments are from their targets at each site.

    Over the channels of one site, with Δμ = mean − target_mean and Δv = var − target_var (or of √(· + eps) with `use_std`):

    - ``l2``: ‖Δμ‖₂ + ‖Δv‖₂, not squared (DeepInversion, arXiv 1912.08795, eq. 4; SRe2L). Gradient 0 where Δ = 0.
    - ``l2_squared``: ‖Δμ‖₂² + ‖Δv‖₂²; ``mse``: the same over C; ``l1``: ‖Δμ‖₁ + ‖Δv‖₁ over C.
    - ``kl``: mean over channels of KL(N(mean, var) ‖ N(target)), variances + eps; the weights do not apply.
    - ``kl_reverse``: the same of KL(N(target) ‖ N(mean, var)) (ABD, arXiv 2106.09701).
    - ``hinge``: Σ max(|Δμ| − slack, 0)² + Σ max(|Δv| − slack, 0)² (DSG, arXiv 2103.01049).

    Parameters
    ----------
    mean, var, target_mean, target_var : [G, T], every site's channels side by side
    site_channels : int64 [S], channels of each site; its sum is T
    mean_weight, var_weight : factors of the two terms

    Returns
    -------
    [G, S] in the moments' dtype
    """
    if distance in ("kl", "kl_reverse"):
        v, t = var + eps, target_var + eps
        if distance == "kl_reverse":
            v, t = t, v
        channel = 0.5 * (torch.log(t / v) + (v + (mean - target_mean).square()) / t - 1)
        return _site_sum(channel, site_channels) / site_channels
    if use_std:
        var, target_var = (var + eps).sqrt(), (target_var + eps).sqrt()
    total = 0
    for delta, weight in ((mean - target_mean, mean_weight), (var - target_var, var_weight)):
        total = total + weight * _distance_term(delta, site_channels, distance, slack)
    return total


def bn_loss(
    mean: list[Tensor],
    var: list[Tensor],
    target_mean: Tensor,
    target_var: Tensor,
    classes: Tensor | None,
    site_weights: Tensor,
    distance: str,
    use_std: bool,
    eps: float,
    slack: float,
    mean_weight: float,
    var_weight: float,
) -> tuple[Tensor, Tensor]:
    """The loss of all sites, and each group's unweighted distance at each site. See `ops.bn_loss` for the contract.

    Returns
    -------
    loss : scalar; distances : [G, S]
    """
    all_means, all_variances = torch.cat(mean, dim=1), torch.cat(var, dim=1)  # [G, T]
    rows = torch.zeros_like(all_means[:, 0], dtype=torch.int64) if len(target_mean) == 1 else classes
    distances = bn_distance(
        all_means,
        all_variances,
        target_mean[rows],
        target_var[rows],
        torch.tensor([site.shape[1] for site in mean], device=all_means.device),
        distance=distance,
        use_std=use_std,
        eps=eps,
        slack=slack,
        mean_weight=mean_weight,
        var_weight=var_weight,
    )
    return (distances * site_weights).sum(1).mean(), distances.detach()


def bn_loss_coefficients(
    mean: list[Tensor], var: list[Tensor], target_mean: Tensor, target_var: Tensor, classes: Tensor | None, *weights_and_options
) -> tuple[Tensor, Tensor]:
    """`bn_loss`'s derivatives by mean and var, as differentiable functions of them. Arguments are those of `bn_loss`.

    Returns
    -------
    dmean, dvar : [G·T], for each site its [G, C], computed in float64 as the kernels do, in the moments' dtype
    """
    site_weights, *options = weights_and_options
    targets = target_mean.double(), target_var.double(), classes, site_weights.double()
    with torch.enable_grad():
        moments = [site.to(torch.float64, copy=True).requires_grad_() for site in (*mean, *var)]
        loss, _ = bn_loss(moments[: len(mean)], moments[len(mean) :], *targets, *options)
        derivatives = torch.autograd.grad(loss, moments, create_graph=True)
        dmean, dvar = torch.cat([d.flatten() for d in derivatives]).to(mean[0].dtype).chunk(2)
    return dmean, dvar


def _distance_term(delta: Tensor, site_channels: Tensor, distance: str, slack: float) -> Tensor:
    if distance == "l1":
        return _site_sum(delta.abs(), site_channels) / site_channels
    if distance == "hinge":
        return _site_sum((delta.abs() - slack).clamp(min=0).square(), site_channels)
    squares = _site_sum(delta.square(), site_channels)
    if distance == "mse":
        return squares / site_channels
    if distance == "l2_squared":
        return squares
    # √ has an infinite slope at 0: where all deltas vanish the norm's subgradient 0 is taken, as torch.norm does.
    return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())


def _site_sum(values: Tensor, site_channels: Tensor) -> Tensor:
    """[G, T] → [G, S]: the sum over each site's channels."""
    return _SiteSum.apply(values, site_channels)


class _SiteSum(torch.autograd.Function):
    """`torch.segment_reduce`, whose own gradient has no derivative."""

    @staticmethod
    def forward(values, site_channels):
        return torch.segment_reduce(values.t().contiguous(), "sum", lengths=site_channels, axis=0).t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, site_channels = inputs
        ctx.width = values.shape[1]
        ctx.save_for_backward(site_channels)

    @staticmethod
    def backward(ctx, gradient):  # [G, S] → [G, T]
        (site_channels,) = ctx.saved_tensors
        return gradient.repeat_interleave(site_channels, dim=1, output_size=ctx.width), None
