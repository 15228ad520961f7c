"""A hook on a BatchNorm layer: while it is there, the layer's forward is the fused operator, which measures as it goes.

A script's own hook reads a layer's input once more, some ten times, to find its mean and variance. `BatchNormHook` instead
changes the class of the layer to a subclass whose forward yields output and distance in one pass; `close()` changes it back.
Parameters, buffers, the state dict and isinstance checks stay as they were, and copies and pickles of the layer are plain
layers. What follows the layer is left alone: a ReLU or an addition is fused by `bnfuse.fuse` only. The names that scripts
know are in this file's neighbours.
"""

from __future__ import annotations

import copyreg
import functools
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends, ops, reference
from ..errors import InputError
from ..reference import moment_dtype
from .observer import Observer
from .whole_batch import Part, merge, over_ranks


class BatchNormHook:
    """The distance of a BatchNorm layer's input from the layer's running statistics, anew at every forward pass.

    ``r_feature = ‖running_mean − mean‖₂ + ‖running_var − var‖₂`` with mean and biased variance over the batch and all positions
    (DeepInversion, arXiv 1912.08795, eq. 4). Derived classes have other targets or groups.

    Parameters
    ----------
    module : a BatchNorm layer, in eval mode and frozen (see Notes)
    process_group : ranks whose batches count as one, ``torch.distributed.group.WORLD`` for all; they may differ in size. Each
        rank's r_feature is that of the whole batch, and its gradient by the rank's own images what one process that holds all
        images has for them. What the ranks share (a generator) would need the sum of their gradients;
        DistributedDataParallel takes the mean, so multiply r_feature by the number of ranks there. One all-reduce of
        (n, Σ, Σ²) a layer in the forward pass, none backward
    backend : which kernels run, see `bnfuse.backends`

    Attributes
    ----------
    r_feature : scalar, float32 (float64 for float64 input) under autocast as without; there once the layer has run. Under
        DataParallel that of the replicas' batches as one
    mean, var : [G, C], the moments that it came from, of the hook's G groups (one but for class-wise hooks)

    Notes
    -----
    A layer that trains (in training mode, or with a weight or bias that asks for a gradient) runs as it is, and r_feature comes
    from the eager formula; a warning says so once. A BatchNorm of another class, with a forward of its own, keeps it, and the
    moments of its input are taken beside it by one operator. Several hooks may share a layer: those that ask for the same are
    measured once, and of others the first is fused.

    Raises
    ------
    InputError : the module is no BatchNorm layer, or has no running statistics; an unknown backend
    """

    def __init__(self, module: nn.Module, *, process_group: dist.ProcessGroup | None = None, backend: str = "auto"):
        if not isinstance(module, _BatchNorm):
            raise InputError(f"{type(self).__name__} goes on a BatchNorm layer, got {type(module).__name__}")
        if module.running_mean is None:
            raise InputError(
                f"{type(self).__name__} measures against running statistics, and this layer has no running statistics"
            )
        backends.check_name(backend)
        self.module, self.process_group, self.backend = module, process_group, backend
        self._attach()

    @property
    def r_feature(self) -> Tensor:
        return self._result()[0]

    @property
    def mean(self) -> Tensor:
        return self._result()[1]

    @property
    def var(self) -> Tensor:
        return self._result()[2]

    def close(self) -> None:
        """Gives the layer its own forward back, once its last hook is closed. What was measured last can still be read."""
        if self._handle is not None:
            self._handle.remove()
        elif self in self.module.__dict__.get("_hooks_of_bnfuse", ()):
            self.module._hooks_of_bnfuse.remove(self)
            if not self.module._hooks_of_bnfuse:
                del self.module._hooks_of_bnfuse
                self.module.__class__ = self.module._own_class

    remove = close

    @property
    def hook(self) -> BatchNormHook:
        """For scripts that call ``.hook.remove()``, on PyTorch's handle of their own hook."""
        return self

    # ---- what derived classes say otherwise ----

    def targets(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """mean and var [K, C] that a forward pass of the layer (or of its replica) is measured against."""
        return module.running_mean[None], module.running_var[None]

    def groups(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """group_starts [G + 1] of the input's samples, and each group's row of the targets [G]; None: one of either."""
        return None, None

    def measure(self, mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor) -> Tensor:
        """The distance of moments from their targets, [G, C] or [1, C] each: a mean over groups."""
        return (norm(target_mean - mean) + norm(target_var - var)).mean()

    @property
    def measured_by_operator(self) -> bool:
        """Whether r_feature is the plain distance from `targets`, which the operator yields itself."""
        return type(self).measure is BatchNormHook.measure

    def runs_plainly(self, kind: type[nn.Module]) -> bool:
        """Whether the forward of this class of layers, called with the input alone, is BatchNorm and nothing else."""
        return kind.forward is _BatchNorm.forward

    @property
    def key(self) -> tuple | None:
        """Hooks of equal keys on one layer have equal measures; None: this one is measured by itself."""
        own = (getattr(type(self), name) for name in ("targets", "groups", "measure"))
        plain = (BatchNormHook.targets, BatchNormHook.groups, BatchNormHook.measure)
        return (self.process_group, self.backend) if tuple(own) == plain else None

    # ---- one forward pass ----

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's output, in x's dtype, and r_feature beside it."""
        group_starts, classes = self.groups(x)
        dtype = moment_dtype(x.dtype)
        scale, shift = _affine(module, dtype)
        options = dict(group_starts=group_starts, backend=self.backend)
        if not self.measured_by_operator or self.process_group is not None or _is_replica(module):
            y, mean, var = ops.bn_act(x, scale, shift, **options)
            self.take(module, x, mean, var, group_starts, classes)
            return y
        # Copies: the layer's own may change before the backward pass, DistributedDataParallel writes them at each forward pass.
        targets = (value.to(dtype, copy=True) for value in self.targets(module))
        y, *measured = ops.bn_act_loss(x, scale, shift, *targets, classes=classes, **options)
        self._measured = tuple(measured)
        return y

    def observe(self, module: nn.Module, x: Tensor, why_eager: str | None) -> None:
        """r_feature of an input on which the layer has run by itself."""
        group_starts, classes = self.groups(x)
        if why_eager is None:
            mean, var = ops.group_moments(x, group_starts, backend=self.backend)
        else:
            self._warn(why_eager)
            mean, var = reference.group_moments(x, ops.check_group_starts(group_starts, x))
        self.take(module, x, mean, var, group_starts, classes)

    def _see(self, module: nn.Module, inputs: tuple) -> None:
        self.observe(module, inputs[0], _unknown_dtype(inputs[0]))

    def take(self, module, x: Tensor, mean: Tensor, var: Tensor, group_starts: Tensor | None, classes: Tensor | None) -> None:
        """Moments [G, C] of this process's, or this replica's, x become the measure."""
        target_mean, target_var = (value.to(mean.dtype) for value in self.targets(module))
        if classes is not None:
            target_mean, target_var = target_mean[classes], target_var[classes]
        part = Part(elements(x, group_starts), mean, var, target_mean, target_var)
        if _is_replica(module) and self._handle is None:  # a layer that keeps its forward cannot tell one round from the next
            self._parts.append(part)
        else:
            self._measured = self._complete(part)

    def _complete(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = part.mean, part.var
        if self.process_group is not None:
            mean, var = over_ranks(part, self.process_group)
        return self.measure(mean, var, part.target_mean, part.target_var), mean, var

    def _result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._parts:
            whole = merge(self._parts, self.module.running_mean.device)
            self._measured, self._parts = self._complete(whole), []
        if self._measured is None:
            raise AttributeError(f"this {type(self).__name__} has measured nothing yet: its layer has not run")
        return self._measured

    def take_from(self, other: BatchNormHook) -> None:
        """The measure of a hook with the same key."""
        self._measured, self._parts = other._measured, [*other._parts]

    def start_replicas(self) -> None:
        """The layer is about to run in several places, of which this is a new round unless none has run yet."""
        self._parts, self._measured = [], None

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a layer is measured by the eager formula, since {why}; bnfuse.freeze(model) freezes it if it is not to train",
                stacklevel=2,
            )

    # ---- on the layer and off it ----

    def _attach(self) -> None:
        self._measured, self._parts, self._handle, self._warned = None, [], None, False
        hooked = isinstance(self.module, HookedBatchNorm)
        kind = self.module._own_class if hooked else type(self.module)
        if not self.runs_plainly(kind):
            self._handle = self.module.register_forward_hook(Observer(self._see))
            return
        if not hooked:
            self.module._hooks_of_bnfuse = []
            self.module.__class__ = _hooked_class(kind)
        self.module._hooks_of_bnfuse.append(self)

    def __getstate__(self) -> dict:
        """Copied and pickled without what was measured, which hangs on a graph; the copy is a hook of the layer's copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_measured", "_parts", "_handle")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._attach()


class HookedBatchNorm:
    """What a BatchNorm layer's class is mixed with while a hook is on the layer: see `_hooked_class`."""

    def forward(self, input: Tensor, *arguments, **named) -> Tensor:
        """input [N, C, *spatial] → the same shape, as the layer's own forward."""
        first, *others = self._hooks_of_bnfuse
        why_eager = _why_eager(self, input)
        if why_eager or arguments or named:
            y = super().forward(input, *arguments, **named)
            first.observe(self, input, why_eager)
        else:
            self._check_input_dim(input)
            y = first.run(self, input)
        for hook in others:
            if hook.key is not None and hook.key == first.key:
                hook.take_from(first)
            else:
                hook.observe(self, input, why_eager)
        return y

    def _replicate_for_data_parallel(self) -> nn.Module:
        for hook in self._hooks_of_bnfuse:
            hook.start_replicas()
        return super()._replicate_for_data_parallel()

    def __reduce_ex__(self, protocol):
        state = {name: value for name, value in self.__dict__.items() if name != "_hooks_of_bnfuse"}
        return copyreg._reconstructor, (self._own_class, object, None), state  # how pickle itself makes an object of a class


@functools.cache
def _hooked_class(kind: type[_BatchNorm]) -> type[HookedBatchNorm]:
    """The subclass that a layer of this class becomes; nobody has to find it by name, since pickles hold the layer's own."""
    return type(f"Hooked{kind.__name__}", (HookedBatchNorm, kind), {"_own_class": kind, "__module__": __name__})


def _why_eager(module: nn.Module, x: Tensor) -> str | None:
    """Why the operators cannot stand for this layer's forward pass; None: they can."""
    if module.training:
        return "it is in training mode"
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (module.weight, module.bias)):
        return "its weight or bias asks for a gradient"
    return _unknown_dtype(x)


def _unknown_dtype(x: Tensor) -> str | None:
    return None if x.dtype in ops.DTYPES else f"its input is {x.dtype}"


def _affine(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale and shift [C] of a BatchNorm in eval mode. Not kept: weights may be changed in ways that nothing tells."""
    scale = (module.running_var.to(dtype) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().to(dtype)
    mean = module.running_mean.to(dtype)
    if module.bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(module.bias.detach().to(dtype), mean, scale, value=-1)


def _is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)


def elements(x: Tensor, group_starts: Tensor | None) -> Tensor:
    """float64 [G, 1]: elements a channel that each group's moments are of."""
    positions = x[0, 0].numel() if len(x) else 0
    samples = ops.check_group_starts(group_starts, x).diff()
    return (samples * positions).double()[:, None]


def norm(delta: Tensor) -> Tensor:
    """[G, C] → [G]; its gradient is 0 where all of delta is."""
    return torch.linalg.vector_norm(delta, dim=1)
