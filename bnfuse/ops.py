"""Every operator's life on one screen: schema, implementation by backend, fake, autograd, and the checked public function.

    bn_act(x, scale, shift, …)   → y, mean, var     one BatchNorm site: output and the moments of its input
    group_moments(x, …)          → mean, var        the moments of any tensor

The arithmetic is in `reference.py` (the specification) and in the compiled kernels; nothing here computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, reference
from .errors import InputError

LIBRARY = torch.library.Library("bnfuse", "DEF")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- bn_forward: y = act(scale·x + shift (+ residual)), and the moments of x ----

LIBRARY.define(
    "bn_forward(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor group_starts, str act, float slope, "
    "str backend) -> (Tensor y, Tensor mean, Tensor var, Tensor mask)"
)


@torch.library.impl(LIBRARY, "bn_forward", "CompositeExplicitAutograd")
def _bn_forward(x, residual, scale, shift, group_starts, act, slope, backend):
    kernels = backends.kernels(backend, x.device)
    return kernels.bn_forward(x, residual, scale, shift, group_starts, act, slope)


@torch.library.register_fake("bnfuse::bn_forward")
def _bn_forward_fake(x, residual, scale, shift, group_starts, act, slope, backend):
    mean, var = _moments_like(x, group_starts)
    shape = reference.mask_shape(x) if reference.needs_mask(residual is not None, act) else (0,)
    return torch.empty_like(x), mean, var, x.new_empty(shape, dtype=torch.uint8)


def _bn_forward_setup(ctx, inputs, output):
    x, residual, scale, shift, group_starts, act, slope, backend = inputs
    _, mean, _, mask = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mask)
    ctx.act, ctx.slope, ctx.backend, ctx.has_residual = act, slope, backend, residual is not None
    # With a mask the residual is not needed again; without a residual there is nothing to keep but x.
    kept_residual = None if mask.numel() or act == "identity" else residual
    ctx.save_for_backward(x, kept_residual, scale, shift, group_starts, mean, mask)


def _bn_forward_backward(ctx, dy, dmean, dvar, _dmask):
    x, residual, scale, shift, group_starts, mean, mask = ctx.saved_tensors
    dx = dresidual = None
    if dy is not None:
        dy = _match_layout(dy, x)
    wants_dresidual = ctx.has_residual and ctx.needs_input_grad[1] and dy is not None
    if ctx.needs_input_grad[0] or (wants_dresidual and ctx.act != "identity"):
        dx, dresidual = torch.ops.bnfuse.bn_backward(
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
            ctx.act,
            ctx.slope,
            wants_dresidual and ctx.act != "identity",
            ctx.backend,
        )
    if wants_dresidual and ctx.act == "identity":
        dresidual = dy
    return dx, dresidual if wants_dresidual else None, None, None, None, None, None, None


torch.library.register_autograd("bnfuse::bn_forward", _bn_forward_backward, setup_context=_bn_forward_setup)


# ---- bn_backward: one read of dy and x, one write of dx (and of d residual) ----

LIBRARY.define(
    "bn_backward(Tensor? dy, Tensor x, Tensor? residual, Tensor mask, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor? dmean, Tensor? dvar, Tensor group_starts, str act, float slope, bool want_dresidual, str backend) "
    "-> (Tensor dx, Tensor dresidual)"
)


@torch.library.impl(LIBRARY, "bn_backward", "CompositeExplicitAutograd")
def _bn_backward(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual, backend):
    kernels = backends.kernels(backend, x.device)
    return kernels.bn_backward(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual)


@torch.library.register_fake("bnfuse::bn_backward")
def _bn_backward_fake(
    dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual, backend
):
    return torch.empty_like(x), torch.empty_like(x) if want_dresidual else x.new_empty(0)


# ---- group_moments: the moments of any tensor, for sites that cannot be fused ----

LIBRARY.define("group_moments(Tensor x, Tensor group_starts, str backend) -> (Tensor mean, Tensor var)")


@torch.library.impl(LIBRARY, "group_moments", "CompositeExplicitAutograd")
def _group_moments(x, group_starts, backend):
    return backends.kernels(backend, x.device).group_moments(x, group_starts)


@torch.library.register_fake("bnfuse::group_moments")
def _group_moments_fake(x, group_starts, backend):
    return _moments_like(x, group_starts)


def _group_moments_setup(ctx, inputs, output):
    x, group_starts, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    ctx.save_for_backward(x, group_starts, output[0])


def _group_moments_autograd(ctx, dmean, dvar):
    x, group_starts, mean = ctx.saved_tensors
    return torch.ops.bnfuse.group_moments_backward(x, mean, dmean, dvar, group_starts, ctx.backend), None, None


torch.library.register_autograd("bnfuse::group_moments", _group_moments_autograd, setup_context=_group_moments_setup)

LIBRARY.define(
    "group_moments_backward(Tensor x, Tensor mean, Tensor? dmean, Tensor? dvar, Tensor group_starts, str backend) -> Tensor"
)


@torch.library.impl(LIBRARY, "group_moments_backward", "CompositeExplicitAutograd")
def _group_moments_backward(x, mean, dmean, dvar, group_starts, backend):
    return backends.kernels(backend, x.device).group_moments_backward(x, mean, dmean, dvar, group_starts)


@torch.library.register_fake("bnfuse::group_moments_backward")
def _group_moments_backward_fake(x, mean, dmean, dvar, group_starts, backend):
    return torch.empty_like(x)


# ---- the backward passes have no derivative of their own: asking for one is an error, not a wrong number ----


def _no_second_order(ctx, *_gradients):
    raise RuntimeError(
        "bnfuse's operators are differentiable once; for second-order gradients call the functions of "
        "bnfuse.reference, which plain autograd differentiates any number of times"
    )


for _name in ("bn_backward", "group_moments_backward"):
    torch.library.register_autograd(f"bnfuse::{_name}", _no_second_order)


def _moments_like(x: Tensor, group_starts: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = (group_starts.shape[0] - 1, x.shape[1]), reference.moment_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


# ---- what the rest of bnfuse calls: inputs checked once, then the operator ----


def bn_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    group_starts: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """A frozen BatchNorm, an optional residual and an activation, with the moments of the input, in one pass.

    ``y = act(scale·x + shift (+ residual))`` with ``scale = γ/√(running_var + ε)``, ``shift = β − running_mean·scale``.
    Differentiable once in x and residual, through y, mean and var alike; scale and shift get no gradient. What is kept for
    backward is x, plus one bit an element for a ReLU-like activation after a residual (SiLU and hardswish keep the residual).

    Parameters
    ----------
    x : [N, C, *spatial], 0 to 3 spatial dimensions; float32, bfloat16, float16 or float64
        Contiguous or channels_last; any other layout is copied first.
    scale, shift : [C], float32 (float64 for float64 x), without gradient
    group_starts : int64 [G + 1] on x's device, non-decreasing from 0 to N; default one group
    residual : like x, or None
    act : one of `reference.ACTIVATIONS`; `slope` is leaky ReLU's
    backend : "auto", "cpp" or "reference"

    Returns
    -------
    y : like x
    mean, var : [G, C], float32 (float64 for float64 x); var is biased; an empty group gives zeros

    Raises
    ------
    InputError : a dtype, shape or device that does not fit
    BackendError : a backend asked for by name that cannot run on x's device
    """
    x = _check_x(x)
    group_starts = _check_group_starts(group_starts, x)
    if act not in reference.ACTIVATIONS:
        raise InputError(f"unknown activation {act!r}; choose one of {', '.join(reference.ACTIVATIONS)}")
    dtype = reference.moment_dtype(x.dtype)
    for name, values in (("scale", scale), ("shift", shift)):
        if values.shape != (x.shape[1],) or values.dtype != dtype or values.device != x.device:
            raise InputError(
                f"{name} must be {dtype} [{x.shape[1]}] on {x.device} to go with x {list(x.shape)}, got "
                f"{values.dtype} {list(values.shape)} on {values.device}"
            )
        if values.requires_grad:
            raise InputError(
                f"{name} asks for a gradient, and bn_act gives none to the frozen network's parameters; "
                "detach it, or freeze the network with bnfuse.freeze(model)"
            )
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            raise InputError(
                f"residual must be like x, {x.dtype} {list(x.shape)} on {x.device}, got {residual.dtype} "
                f"{list(residual.shape)} on {residual.device}"
            )
        residual = _match_layout(residual, x)
    y, mean, var, _ = torch.ops.bnfuse.bn_forward(
        x, residual, scale.contiguous(), shift.contiguous(), group_starts, act, slope, backend
    )
    return y, mean, var


def group_moments(x: Tensor, group_starts: Tensor | None = None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [N, C, *spatial] over each group: two [G, C]. Arguments and errors as in `bn_act`."""
    x = _check_x(x)
    return torch.ops.bnfuse.group_moments(x, _check_group_starts(group_starts, x), backend)


def _check_x(x: Tensor) -> Tensor:
    if x.dtype not in DTYPES:
        raise InputError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if not 2 <= x.dim() <= 5:
        raise InputError(f"x must be [N, C, *spatial] with 0 to 3 spatial dimensions, got shape {list(x.shape)}")
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    """Contiguous, or channels_last in any number of spatial dimensions: the two layouts the kernels walk."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _match_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` with exactly x's strides, copied if it must be."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


def _check_group_starts(group_starts: Tensor | None, x: Tensor) -> Tensor:
    if group_starts is None:
        return torch.tensor([0, x.shape[0]], device=x.device)
    if group_starts.dtype != torch.int64 or group_starts.dim() != 1 or len(group_starts) < 2:
        raise InputError(
            f"group_starts must be int64 [G + 1] with at least one group, got {group_starts.dtype} {list(group_starts.shape)}"
        )
    if group_starts.device != x.device:
        raise InputError(f"group_starts is on {group_starts.device}, x on {x.device}; move one of them")
    # Its values are checked where that costs no wait for a device, and not while a compiler traces.
    if group_starts.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake(group_starts):
        starts = group_starts.tolist()
        if starts[0] != 0 or starts[-1] != x.shape[0] or any(a > b for a, b in zip(starts, starts[1:])):
            raise InputError(f"group_starts must run from 0 to the batch size {x.shape[0]} without decreasing, got {starts}")
    return group_starts.contiguous()


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
