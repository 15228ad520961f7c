"""Every operator's whole life: schema, implementations, autograd, fake, and at the end the checked public functions.

    bn_act(x, scale, shift, …)                → y, mean, var         one BatchNorm site: output and the moments of its input
    bn_act_loss(x, scale, shift, targets, …)  → y, loss, mean, var   the same with the distance from the site's targets
    group_moments(x, …)                       → mean, var            the moments of any tensor
    bn_loss(mean, var, targets, …)            → loss                 the distance of all sites' moments from their targets

An operator exists in one namespace a backend, with one schema: `bnfuse_reference` and `bnfuse_triton` are differentiated here,
and implemented by `reference.py` and the Triton kernels; `bnfuse_cpp` is all in csrc/, with kernels for the CPU and for CUDA.
Gradients of gradients are said here for all of them: those of the definitions in `reference.py`. Nothing here computes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from . import backends, reference
from .errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# bnfuse_cpp defines its own, word for word the same, in csrc/.
SCHEMAS = {
    # y = act(scale·x + shift (+ residual)), and the moments of x
    "bn_forward": "(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor group_starts, str act, float slope) "
    "-> (Tensor, Tensor, Tensor, Tensor)",  # y, mean, var, mask
    # one read of dy and x, one write of dx (and of d residual)
    "bn_backward": "(Tensor? dy, Tensor x, Tensor? residual, Tensor mask, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor? dmean, Tensor? dvar, Tensor group_starts, str act, float slope, bool want_dresidual) "
    "-> (Tensor, Tensor)",  # dx, dresidual
    # the moments of any tensor, for sites that cannot be fused
    "group_moments": "(Tensor x, Tensor group_starts) -> (Tensor, Tensor)",  # mean, var
    "group_moments_backward": "(Tensor x, Tensor mean, Tensor? dmean, Tensor? dvar, Tensor group_starts) -> Tensor",
}


# What only the compiled backends have as operators of their own: for the reference it is plain differentiable PyTorch.
COMPILED_SCHEMAS = {
    # bn_forward, the site's loss and the loss's derivatives by mean and var
    "bn_forward_with_targets": "(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor group_starts, "
    "Tensor target_mean, Tensor target_var, Tensor? classes, float weight, str act, float slope, str distance, bool use_std, "
    "float eps, float slack, float mean_weight, float var_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",  # y, mean, var, mask, loss, dmean, dvar
    # the loss of all sites and its derivatives, site after site
    "bn_loss": "(Tensor[] mean, Tensor[] var, Tensor target_mean, Tensor target_var, Tensor? classes, Tensor site_weights, "
    "str distance, bool use_std, float eps, float slack, float mean_weight, float var_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",  # loss, distances, dmean, dvar
}

# bn_loss's derivatives by plain differentiable PyTorch, on every backend: for a gradient that is to be differentiated.
COEFFICIENTS_SCHEMA = (
    "(Tensor[] mean, Tensor[] var, Tensor target_mean, Tensor target_var, Tensor? classes, Tensor site_weights, "
    "str distance, bool use_std, float eps, float slack, float mean_weight, float var_weight) "
    "-> (Tensor, Tensor)"  # dmean, dvar
)


# ---- autograd of the backends in Python; that of bnfuse_cpp is in csrc/autograd.cpp ----


def _bn_forward_setup(ctx, inputs, output):
    x, residual, scale, shift, group_starts, act, slope = inputs
    _, mean, _, mask = output
    _keep_site(ctx, x, residual, scale, shift, group_starts, mean, mask, act, slope)
    ctx.mark_non_differentiable(mask)


def _keep_site(ctx, x, residual, scale, shift, group_starts, mean, mask, act, slope, *coefficients):
    ctx.set_materialize_grads(False)
    ctx.act, ctx.slope, ctx.has_residual = act, slope, residual is not None
    # With a mask the residual is not needed again; without a residual there is nothing to keep but x.
    kept_residual = None if mask.numel() or act == "identity" else residual
    ctx.save_for_backward(x, kept_residual, scale, shift, group_starts, mean, mask, *coefficients)


def _site_gradients(backend, ctx, dy, dmean, dvar):
    """dx and dresidual, None where nobody wants them."""
    x, residual, scale, shift, group_starts, mean, mask = ctx.saved_tensors[:7]
    dx = dresidual = None
    if dy is not None:
        dy = _match_layout(dy, x)
    wants_dresidual = ctx.has_residual and ctx.needs_input_grad[1] and dy is not None
    derives_dresidual = wants_dresidual and ctx.act != "identity"
    if ctx.needs_input_grad[0] or derives_dresidual:
        moments = mean, dmean, dvar, group_starts
        dx, dresidual = backend.bn_backward(
            dy, x, residual, mask, scale, shift, *moments, ctx.act, ctx.slope, derives_dresidual
        )
    if wants_dresidual and ctx.act == "identity":
        dresidual = dy
    return dx, dresidual if wants_dresidual else None


def _bn_forward_backward(backend, ctx, dy, dmean, dvar, _dmask):
    return *_site_gradients(backend, ctx, dy, dmean, dvar), *[None] * 5


def _group_moments_setup(ctx, inputs, output):
    x, group_starts = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, group_starts, output[0])


def _group_moments_backward(backend, ctx, dmean, dvar):
    x, group_starts, mean = ctx.saved_tensors
    return backend.group_moments_backward(x, mean, dmean, dvar, group_starts), None


def _bn_forward_with_targets_setup(ctx, inputs, output):
    x, residual, scale, shift, group_starts, target_mean, target_var, classes, ctx.weight, act, slope, *ctx.options = inputs
    _check_constants(target_mean=target_mean, target_var=target_var)
    _, mean, var, mask, _, dmean, dvar = output
    loss = var, target_mean, target_var, classes
    _keep_site(ctx, x, residual, scale, shift, group_starts, mean, mask, act, slope, dmean, dvar, *loss)
    ctx.mark_non_differentiable(mask, dmean, dvar)


def _bn_forward_with_targets_backward(backend, ctx, dy, dmean, dvar, _dmask, dloss, _ddmean, _ddvar):
    mean, _, *coefficients, var, target_mean, target_var, classes = ctx.saved_tensors[5:]
    if dloss is not None:
        if torch.is_grad_enabled():
            targets = target_mean, target_var, classes, mean.new_full((1,), ctx.weight)
            coefficients = [c.view_as(mean) for c in reference.bn_loss_coefficients([mean], [var], *targets, *ctx.options)]
        through_loss = [c * dloss for c in coefficients]
        dmean, dvar = (new if old is None else old + new for old, new in zip((dmean, dvar), through_loss))
    return *_site_gradients(backend, ctx, dy, dmean, dvar), *[None] * 15


def _bn_loss_setup(ctx, inputs, output):
    mean, var, *targets_and_weights = inputs[:6]
    target_mean, target_var, _, site_weights = targets_and_weights
    _check_constants(target_mean=target_mean, target_var=target_var, site_weights=site_weights)
    ctx.set_materialize_grads(False)
    ctx.groups, ctx.channels, ctx.options = mean[0].shape[0], [site.shape[1] for site in mean], inputs[6:]
    ctx.save_for_backward(*output[2:], *mean, *var, *targets_and_weights)
    ctx.mark_non_differentiable(*output[1:])


def _bn_loss_backward(_backend, ctx, dloss, *_others):
    sites = len(ctx.channels)
    if dloss is None:
        return [None] * sites, [None] * sites, *[None] * 10
    dmean, dvar, *given = ctx.saved_tensors
    if torch.is_grad_enabled():
        dmean, dvar = reference.bn_loss_coefficients(given[:sites], given[sites : 2 * sites], *given[2 * sites :], *ctx.options)
    sizes = [ctx.groups * channels for channels in ctx.channels]
    gradients = [[part.view(ctx.groups, -1) for part in (c * dloss).split(sizes)] for c in (dmean, dvar)]
    return *gradients, *[None] * 10


# ---- the second order, of every backend's operators: the gradients' own gradients ----


def _keep_arguments(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]


def _differentiate(definition, _backend, ctx, *gradients):
    """The gradient of an operator whose definition is plain PyTorch: `definition` is called again and differentiated."""
    arguments = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others)]
    with torch.enable_grad():
        # Aliases: one argument may have been computed from another, and each is to get what comes through itself alone.
        arguments = [a.view_as(a) if needed else a for a, needed in zip(arguments, ctx.needs_input_grad)]
        outputs = definition(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    used = [(out, gradient) for out, gradient in zip(outputs, gradients) if gradient is not None and out.requires_grad]
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
    result = [None] * len(arguments)
    if used:
        outputs, gradients = zip(*used)
        inputs, graph = [arguments[index] for index in wanted], torch.is_grad_enabled()
        found = torch.autograd.grad(outputs, inputs, gradients, create_graph=graph, allow_unused=True)
        for index, gradient in zip(wanted, found):
            result[index] = gradient
    return tuple(result)


AUTOGRAD = {
    "bn_forward": (_bn_forward_backward, _bn_forward_setup),
    "group_moments": (_group_moments_backward, _group_moments_setup),
    "bn_forward_with_targets": (_bn_forward_with_targets_backward, _bn_forward_with_targets_setup),
    "bn_loss": (_bn_loss_backward, _bn_loss_setup),
}
SECOND_ORDER = {
    name: (functools.partial(_differentiate, getattr(reference, name)), _keep_arguments)
    for name in ("bn_backward", "group_moments_backward")
}


def _define(namespace: str, schemas: dict[str, str], implementations) -> torch.library.Library:
    """A backend in Python: operators of these schemas, whose implementations are the namesakes in a module."""
    library = torch.library.Library(namespace, "DEF")
    backend = getattr(torch.ops, namespace)
    for name, schema in schemas.items():
        library.define(name + schema)
        library.impl(name, getattr(implementations, name), "CompositeExplicitAutograd")
        backward, setup = (AUTOGRAD | SECOND_ORDER)[name]
        torch.library.register_autograd(
            f"{namespace}::{name}", functools.partial(backward, backend), setup_context=setup, lib=library
        )
    return library


class _TritonKernels:
    """The functions of `bnfuse.kernels`, which is imported when the first of them is called: importing Triton takes a while."""

    def __getattr__(self, name):
        def call(*arguments):
            from . import kernels

            return getattr(kernels, name)(*arguments)

        return call


LIBRARIES = {"reference": _define("bnfuse_reference", SCHEMAS, reference)}
if backends.triton_is_installed():
    LIBRARIES["triton"] = _define("bnfuse_triton", SCHEMAS | COMPILED_SCHEMAS, _TritonKernels())
NAMESPACES = [f"bnfuse_{name}" for name in LIBRARIES] + (["bnfuse_cpp"] if backends.extension else [])

# What csrc/autograd.cpp leaves to this file: the second order.
LIBRARIES["reference"].define("bn_loss_coefficients" + COEFFICIENTS_SCHEMA)
LIBRARIES["reference"].impl("bn_loss_coefficients", reference.bn_loss_coefficients, "CompositeImplicitAutograd")
if backends.extension:
    for _name, (_backward, _setup) in SECOND_ORDER.items():
        torch.library.register_autograd(
            f"bnfuse_cpp::{_name}", functools.partial(_backward, torch.ops.bnfuse_cpp), setup_context=_setup
        )


# ---- what every backend's operators look like to a compiler; these run, and not a kernel, where one argument is on "meta" ----


def _check_one_device(like: Tensor, *tensors: Tensor | None) -> None:
    if strange := [tensor.device for tensor in tensors if tensor is not None and tensor.device != like.device]:
        raise InputError(f"all tensors must be on one device, got one on {strange[0]} beside one on {like.device}")


def _bn_forward_fake(x, residual, scale, shift, group_starts, act, slope):
    _check_one_device(x, residual, scale, shift, group_starts)
    mean, var = _group_moments_fake(x, group_starts)
    shape = reference.mask_shape(x) if reference.needs_mask(residual is not None, act) else (0,)
    return torch.empty_like(x), mean, var, x.new_empty(shape, dtype=torch.uint8)


def _bn_backward_fake(dy, x, residual, mask, scale, shift, mean, dmean, dvar, group_starts, act, slope, want_dresidual):
    return torch.empty_like(x), torch.empty_like(x) if want_dresidual else x.new_empty(0)


def _group_moments_fake(x, group_starts):
    shape, dtype = (group_starts.shape[0] - 1, x.shape[1]), reference.moment_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _group_moments_backward_fake(x, mean, dmean, dvar, group_starts):
    return torch.empty_like(x)


def _bn_forward_with_targets_fake(x, residual, scale, shift, group_starts, *arguments):
    act, slope = arguments[4:6]
    _check_one_device(x, *arguments[:3])
    y, mean, var, mask = _bn_forward_fake(x, residual, scale, shift, group_starts, act, slope)
    return y, mean, var, mask, mean.new_empty(()), torch.empty_like(mean), torch.empty_like(var)


def _bn_loss_fake(mean, var, target_mean, target_var, classes, site_weights, *_options):
    _check_one_device(*mean, *var, target_mean, target_var, classes, site_weights)
    groups, width = mean[0].shape[0], sum(site.shape[1] for site in mean)
    return (
        mean[0].new_empty(()),
        mean[0].new_empty((groups, len(mean))),
        mean[0].new_empty(groups * width),
        mean[0].new_empty(groups * width),
    )


FAKES = {
    "bn_forward": _bn_forward_fake,
    "bn_backward": _bn_backward_fake,
    "group_moments": _group_moments_fake,
    "group_moments_backward": _group_moments_backward_fake,
    "bn_forward_with_targets": _bn_forward_with_targets_fake,
    "bn_loss": _bn_loss_fake,
}
for _namespace in NAMESPACES:
    for _name in SCHEMAS if _namespace == "bnfuse_reference" else FAKES:
        torch.library.register_fake(f"{_namespace}::{_name}", FAKES[_name])


# ---- the operators of a backend ----


def _bn_forward_with_targets(
    x, residual, scale, shift, group_starts, target_mean, target_var, classes, weight, act, slope, *options
):
    """The reference's: its site, then its loss over that one site."""
    forward = torch.ops.bnfuse_reference.bn_forward.default
    y, mean, var, mask = forward(x, residual, scale, shift, group_starts, act, slope)
    loss, _ = reference.bn_loss([mean], [var], target_mean, target_var, classes, mean.new_full((1,), weight), *options)
    return y, mean, var, mask, loss


def _operators_of(namespace: str) -> SimpleNamespace:
    names = SCHEMAS if namespace == "bnfuse_reference" else FAKES
    found = SimpleNamespace(**{name: getattr(getattr(torch.ops, namespace), name).default for name in names})
    found.checks_arguments = namespace == "bnfuse_cpp"
    if namespace == "bnfuse_reference":
        # The eager loss is plain differentiable PyTorch, second order included: no operator need be made of it.
        found.bn_loss, found.bn_forward_with_targets = reference.bn_loss, _bn_forward_with_targets
    return found


OPERATORS = {namespace.removeprefix("bnfuse_"): _operators_of(namespace) for namespace in NAMESPACES}
if backends.extension:
    OPERATORS["cuda"] = OPERATORS["cpp"]  # one operator with a kernel for either device


def operators(backend: str, device_type: str) -> SimpleNamespace:
    """The operators of `SCHEMAS`, bn_forward_with_targets and bn_loss, of the backend that `backends.resolve` takes."""
    return OPERATORS[backends.resolve(backend, device_type)]


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
    Differentiable in x and residual, through y, mean and var alike; scale and shift get no gradient. What is kept for
    backward is x, plus one bit an element for a ReLU-like activation after a residual (SiLU and hardswish keep the residual).

    Second order: a gradient made with ``create_graph=True`` may be differentiated again. It comes from the same kernels; its
    own gradient is that of its definition, `reference.bn_backward`, in eager PyTorch on every backend (docs/second_order.md).

    Parameters
    ----------
    x : [N, C, *spatial], 0 to 3 spatial dimensions; float32, bfloat16, float16 or float64
        Contiguous or channels_last; any other layout is copied first.
    scale, shift : [C], float32 (float64 for float64 x), without gradient
    group_starts : int64 [G + 1] on x's device, non-decreasing from 0 to N; default one group
    residual : like x, or None
    act : one of `reference.ACTIVATIONS`; `slope` is leaky ReLU's
    backend : see `bnfuse.backends`

    Returns
    -------
    y : like x
    mean, var : [G, C], float32 (float64 for float64 x); var is biased; an empty group gives zeros

    Raises
    ------
    InputError : a dtype, shape or device that does not fit
    BackendError : a backend asked for by name that cannot run on x's device
    """
    return _run_site("bn_forward", backend, x, residual, scale, shift, group_starts, act, slope)[:3]


def bn_act_loss(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    target_mean: Tensor,
    target_var: Tensor,
    *,
    group_starts: Tensor | None = None,
    classes: Tensor | None = None,
    weight: float = 1.0,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
    distance: str = "l2",
    use_std: bool = False,
    eps: float = 1e-8,
    slack: float = 0.0,
    mean_weight: float = 1.0,
    var_weight: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bn_act` and the site's own loss in one operator, for code that matches one layer at a time.

    ``loss = weight · mean over groups g of distance(moments[g], targets[class of g])``. A whole network's sites are better
    matched together, by `bn_loss`.

    Parameters
    ----------
    x, scale, shift, group_starts, residual, act, slope, backend : as in `bn_act`
    target_mean, target_var : [K, C], a row a class, or [1, C] for every group alike; in the moments' dtype, without gradient
    classes : int64 [G], each group's row of the targets; not needed where there is one row
    weight : the loss's factor
    distance : one of `reference.DISTANCES`; use_std, eps, slack, mean_weight, var_weight : see `reference.bn_distance`

    Returns
    -------
    y : like x; loss : scalar; mean, var : [G, C]. All are differentiable in x and residual, as `bn_act`'s

    Raises
    ------
    As `bn_act`, and InputError for an unknown distance, targets that do not fit or an x without channels
    """
    _check_channels("x", x)
    if isinstance(weight, Tensor):
        _check_constants(weight=weight)
    targets = target_mean, target_var, classes, weight
    options = distance, use_std, eps, slack, mean_weight, var_weight
    y, mean, var, _, loss, *_ = _run_site(
        "bn_forward_with_targets", backend, x, residual, scale, shift, group_starts, act, slope, targets, options
    )
    return y, loss, mean, var


def _run_site(name, backend, x, residual, scale, shift, group_starts, act, slope, targets=(), options=()) -> tuple[Tensor, ...]:
    """The operator of this name, its arguments checked and brought into a layout that it takes.

    A compiled one sees for itself whether they are fit, and most are. What it refuses comes to the checks here, which take
    longer than the kernel of a small site: they say in bnfuse's own words what is wrong, or copy what has another layout.
    """
    found = operators(backend, x.device.type)
    run = getattr(found, name)
    if group_starts is not None:
        outputs = _run_if_fit(found, run, x, residual, scale, shift, group_starts, *targets, act, slope, *options)
        if outputs is not None:
            return outputs
    x, residual, group_starts = _check_site(x, residual, scale, shift, group_starts, act, targets, options)
    return run(x, residual, scale.contiguous(), shift.contiguous(), group_starts, *targets, act, slope, *options)


def _run_if_fit(found: SimpleNamespace, run, x: Tensor, *arguments) -> tuple[Tensor, ...] | None:
    """What an operator of `found` returns; None where it refuses its arguments, or cannot be relied on to see that they are
    unfit: the compiled ones can, where they run and are not traced."""
    if found.checks_arguments and type(x) is Tensor and not torch.compiler.is_compiling():
        try:
            return run(x, *arguments)
        except RuntimeError:
            pass  # whatever it is, the caller finds it, or it comes again when the operator is run on what the caller mended
    return None


def _check_site(x, residual, scale, shift, group_starts, act, targets, options) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, the residual in x's layout and the groups, ready for an operator; InputError where an argument does not fit."""
    x = _check_x(x)
    group_starts = check_group_starts(group_starts, x)
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
    if targets:
        if options[0] not in reference.DISTANCES:
            raise InputError(f"unknown distance {options[0]!r}; choose one of {', '.join(reference.DISTANCES)}")
        _check_targets(*targets[:3], len(group_starts) - 1, x.shape[1], dtype, x.device)
    return x, residual, group_starts


def _check_targets(target_mean, target_var, classes, groups: int, width: int, dtype, device) -> None:
    for name, values in (("target_mean", target_mean), ("target_var", target_var)):
        fits = values.dim() == 2 and values.shape[1] == width and values.shape[0] == target_mean.shape[0] > 0
        if not fits or values.dtype != dtype or values.device != device:
            raise InputError(f"{name} must be {dtype} [K, {width}] on {device}, a row a class, got {_describe(values)}")
    _check_constants(target_mean=target_mean, target_var=target_var)
    if len(target_mean) > 1:
        _check_classes(classes, groups, len(target_mean), device)


def _check_constants(**constants: Tensor) -> None:
    """The loss is a function of the moments: what they are compared with, and how that weighs, gets no gradient anywhere."""
    for name, values in constants.items():
        if values.requires_grad:
            raise InputError(f"{name} asks for a gradient, and the loss gives one to mean and var alone; detach it")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _check_channels(name: str, *tensors: Tensor) -> None:
    """Of no channels there is no distance from targets: some distances are means over channels."""
    for tensor in tensors:
        if not tensor.numel() and tensor.dim() > 1 and tensor.shape[1] == 0:
            raise InputError(
                f"{name} must have at least one channel to be held against targets, got shape {list(tensor.shape)}; leave the "
                "site out"
            )


def _check_classes(classes: Tensor | None, groups: int, rows: int, device: torch.device) -> None:
    if classes is None:
        raise InputError("class-wise targets need the class of each group: pass classes, int64 [G]")
    if classes.shape != (groups,) or classes.dtype != torch.int64 or classes.device != device:
        raise InputError(
            f"classes must be int64 [{groups}] on {device}, one a group, got {classes.dtype} {list(classes.shape)} on "
            f"{classes.device}"
        )
    if classes.device.type == "cpu" and _is_plain(classes):
        if groups and not 0 <= int(classes.min()) <= int(classes.max()) < rows:
            raise InputError(f"classes must be from 0 to {rows - 1}, got {classes.tolist()}")


def bn_act_unchecked(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, group_starts: Tensor, act: str, slope: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`bn_act` for a caller that has checked its arguments: x's and the residual's layouts alone are seen to."""
    found = operators(backend, x.device.type)
    outputs = _run_if_fit(found, found.bn_forward, x, residual, scale, shift, group_starts, act, slope)
    if outputs is None:
        x = x if _is_dense(x) else x.contiguous()
        residual = None if residual is None else _match_layout(residual, x)
        outputs = found.bn_forward(x, residual, scale, shift, group_starts, act, slope)
    return outputs[:3]


def group_moments(x: Tensor, group_starts: Tensor | None = None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [N, C, *spatial] over each group: two [G, C]. Arguments and errors as in `bn_act`.

    The same call gives the same bits. Those of `bn_act` for the same x, and with one or another activation or residual, may
    differ from them in their last bits on CUDA, where each kernel cuts x to suit its registers.
    """
    x = _check_x(x)
    return operators(backend, x.device.type).group_moments(x, check_group_starts(group_starts, x))


def bn_loss(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    target_mean: Tensor,
    target_var: Tensor,
    site_weights: Tensor,
    *,
    classes: Tensor | None = None,
    distance: str = "l2",
    use_std: bool = False,
    eps: float = 1e-8,
    slack: float = 0.0,
    mean_weight: float = 1.0,
    var_weight: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The BatchNorm-statistic loss of a whole network, all sites in one operator.

    ``loss = mean over groups g of Σ over sites s of site_weights[s] · distance(moments[g, s], targets[class of g, s])``; the
    distances are those of `reference.bn_distance`. Differentiable in mean and var, as `bn_act` is; the gradient's
    coefficients come out of the same pass as the loss, but those of a gradient that is to be differentiated are computed anew.

    Parameters
    ----------
    mean, var : list or tuple, for each of S sites [G, C] in site order, float32 or float64, all of one dtype
    target_mean, target_var : [K, T], a row a class, T = ΣC; or [1, T] for every group alike; in the moments' dtype, without
        gradient
    site_weights : [S], in the moments' dtype, without gradient
    classes : int64 [G], each group's row of the targets; not needed where there is one row
    distance, use_std, eps, slack, mean_weight, var_weight : see `reference.bn_distance`
    backend : see `bnfuse.backends`

    Returns
    -------
    loss : scalar
    distances : [G, S], unweighted and without gradient

    Raises
    ------
    InputError : an unknown distance, no groups, or a site without channels; shapes, dtypes, devices or classes that do not fit
    """
    if distance in reference.EAGER_DISTANCES:
        backend = "reference"
    elif distance not in reference.DISTANCES:
        known = (*reference.DISTANCES, *reference.EAGER_DISTANCES)
        raise InputError(f"unknown distance {distance!r}; choose one of {', '.join(known)}")
    for name, sites in (("mean", mean), ("var", var)):
        if not isinstance(sites, (list, tuple)):
            raise InputError(f"{name} must be a list or tuple of [G, C] tensors, one a site, got a {type(sites).__name__}")
    if not mean:
        raise InputError("bn_loss needs the moments of at least one site, got none")
    _check_channels("the mean of every site", *mean)
    if mean[0].shape[:1] == (0,):
        raise InputError("the loss is a mean over groups, and these are moments of none: pass those of at least one")
    backend = backends.resolve(backend, mean[0].device.type)
    run = OPERATORS[backend].bn_loss
    arguments = list(mean), list(var), target_mean, target_var, classes, site_weights
    options = distance, use_std, eps, slack, mean_weight, var_weight
    # As a site's: kernels check what they are given, the reference does not.
    if backend == "reference" or torch.compiler.is_compiling():
        _check_loss(*arguments)
        return run(*arguments, *options)[:2]
    try:
        return run(*arguments, *options)[:2]
    except RuntimeError:
        _check_loss(*arguments)
        raise


def _check_loss(mean: list[Tensor], var: list[Tensor], target_mean, target_var, classes, site_weights) -> None:
    dtype, device, groups = mean[0].dtype, mean[0].device, mean[0].shape[:1]
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"mean must be float32 or float64, got {_describe(mean[0])}")
    if len(var) != len(mean):
        raise InputError(f"var must have one tensor a site, {len(mean)} as mean has, got {len(var)}")
    for site, (site_mean, site_var) in enumerate(zip(mean, var)):
        if site_mean.dim() != 2 or site_mean.shape[:1] != groups or site_mean.dtype != dtype or site_mean.device != device:
            raise InputError(
                f"mean must be [G, C] at every site, of one G, dtype and device: site 0 has {_describe(mean[0])}, site {site} "
                f"{_describe(site_mean)}"
            )
        if site_var.shape != site_mean.shape or site_var.dtype != dtype or site_var.device != device:
            raise InputError(f"var must be like mean, at site {site} {_describe(site_mean)}, got {_describe(site_var)}")
    _check_targets(target_mean, target_var, classes, groups[0], sum(site.shape[1] for site in mean), dtype, device)
    if site_weights.shape != (len(mean),) or site_weights.dtype != dtype or site_weights.device != device:
        raise InputError(f"site_weights must be {dtype} [{len(mean)}] on {device}, one a site, got {_describe(site_weights)}")
    _check_constants(site_weights=site_weights)


def _check_x(x: Tensor) -> Tensor:
    if x.dtype not in DTYPES:
        raise InputError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if not 2 <= x.dim() <= 5:
        raise InputError(f"x must be [N, C, *spatial] with 0 to 3 spatial dimensions, got shape {list(x.shape)}")
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    """Contiguous, or channels_last in any number of spatial dimensions: the two layouts the kernels walk."""
    return x.is_contiguous() or x.dim() > 1 and x.movedim(1, -1).is_contiguous()


def _match_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` with exactly x's strides, copied if it must be."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


def check_group_starts(group_starts: Tensor | None, x: Tensor) -> Tensor:
    """The groups of x's samples, int64 [G + 1] on x's device; one group where none are given. InputError if they do not fit.

    What comes back may be shared, with the caller's tensor or between all callers that give none: it must not be changed.
    """
    if group_starts is None:
        return _one_group(x)
    if not isinstance(group_starts, Tensor):
        raise InputError(f"group_starts must be a tensor, int64 [G + 1], got a {type(group_starts).__name__}")
    if group_starts.dtype != torch.int64 or group_starts.dim() != 1 or len(group_starts) < 2:
        raise InputError(
            f"group_starts must be int64 [G + 1] with at least one group, got {group_starts.dtype} {list(group_starts.shape)}"
        )
    if group_starts.device != x.device:
        raise InputError(f"group_starts is on {group_starts.device}, x on {x.device}; move one of them")
    # Its values are checked where that costs no wait for a device, and not while a compiler traces.
    if group_starts.device.type == "cpu" and _is_plain(group_starts):
        starts = group_starts.tolist()
        if starts[0] != 0 or starts[-1] != x.shape[0] or any(a > b for a, b in zip(starts, starts[1:])):
            raise InputError(f"group_starts must run from 0 to the batch size {x.shape[0]} without decreasing, got {starts}")
    return group_starts.contiguous()


def _one_group(x: Tensor) -> Tensor:
    if _is_plain(x):
        return _cached_one_group(x.shape[0], x.device)
    return torch.arange(2, device=x.device) * x.shape[0]


# None is ever let go: a captured CUDA graph reads the tensor's memory at each replay, and nothing else keeps that alive.
@functools.cache
def _cached_one_group(samples: int, device: torch.device) -> Tensor:
    """int64 [2], shared by all that ask: it must not be changed in place."""
    with torch.inference_mode(False):  # or no later pass could keep it for backward
        return torch.tensor([0, samples], device=device)


def _is_plain(tensor: Tensor) -> bool:
    """Whether values may be read and new tensors kept: nothing traces, and no mode or transform wraps what is made now."""
    return not (
        torch.compiler.is_compiling()
        or isinstance(tensor, torch._subclasses.FakeTensor)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )
