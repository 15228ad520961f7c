"""Rewrites a frozen network so that each BatchNorm (+ residual) (+ activation) becomes one fused site that yields moments.

`fuse(model)` traces the network with torch.fx and folds the chains it finds; where tracing fails it replaces the BatchNorm
modules alone. Sites that are no BatchNorm inputs have an operator of their own beside what they are an input or output of.
Weights are shared with the original, which stays as it was; those of convolutions may be laid out anew. Not for training:
BatchNorm is applied with its running statistics.
"""

from __future__ import annotations

import copy
import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import backends, ops, reference
from .convolutions import freeze_convolutions
from .errors import InputError
from .models import check_teacher
from .moments import Moments, Observer, Tape
from .sites import Site, SiteRule, call_name, hook_site, leaves, select


class FusedModel(nn.Module):
    """A frozen network that returns its logits together with the moments of its sites.

    Attributes
    ----------
    traced : whether chains were fused, or (False) only the BatchNorm modules were replaced
    memory_format : the layout that images [N, C, H, W] are brought to, see `fuse`
    site_names : the sites that were asked for, see `sites.Site`; they yield moments if their modules run
    """

    def __init__(self, body: nn.Module, plan: _Plan, traced: bool, memory_format: torch.memory_format):
        super().__init__()
        self.body, self._tape, self.traced, self.memory_format = body, plan.tape, traced, memory_format
        self.site_names = [site.name for site in plan.sites]
        self._observers = nn.ModuleList(plan.observers.values())
        self._pixels = [observer for observer in plan.observers.values() if not observer.site.module_name]

    def forward(self, images: Tensor, group_starts: Tensor | None = None) -> tuple[Tensor, Moments]:
        """Runs the network once.

        Parameters
        ----------
        images : [N, C, H, W], normalised as the network expects
        group_starts : int64 [G + 1] on the images' device; default the whole batch as one group

        Returns
        -------
        logits : what the network returns, [N, K]
        moments : for each site that ran its mean and biased variance, [G, C] each, in the order they ran. A site that runs
            several times in one pass appears as ``name``, ``name#2``, …
        """
        self._tape.start(ops.check_group_starts(group_starts, images), len(images))
        if images.dim() == 4 and self.memory_format != torch.preserve_format:
            images = images.contiguous(memory_format=self.memory_format)
        for observer in self._pixels:
            observer(images)
        logits = self.body(images)
        return logits, self._tape.finish()

    def running_means(self, names: Iterable[str], channels: Iterable[int] | None = None) -> Tensor:
        """The running means of these sites (``name#2`` is the layer `name`), side by side: [T].

        `channels` of each are needed where there are sites that are no BatchNorm inputs: theirs are taken to be 0.
        """
        known = {m.site_name: m.running_mean for m in self.body.modules() if isinstance(m, _Site)}
        device = next(chain(self.body.buffers(), self.body.parameters())).device
        names = list(names)
        found = [known.get(name.split("#")[0]) for name in names]
        sizes = channels if channels is not None else [0] * len(names)
        return torch.cat([torch.zeros(c, device=device) if mean is None else mean for mean, c in zip(found, sizes)])

    def describe(self) -> str:
        """One line a site: its name, and what was folded into it."""
        sites = [m for m in self.body.modules() if isinstance(m, _Site)]
        how = "traced" if self.traced else "BatchNorm modules alone, the network could not be traced"
        lines = [f"  {site.site_name}: {site.extra_repr()}" for site in sites]
        lines += [f"  {observer.site.name}: moments only" for observer in self._observers]
        return "\n".join([f"{len(sites)} fused sites ({how})", *lines])


def fuse(
    model: nn.Module,
    *,
    sites: Sequence[str] = ("bn",),
    backend: str = "auto",
    trace: bool = True,
    memory_format: torch.memory_format | None = None,
) -> FusedModel:
    """Fuses a frozen network's BatchNorm layers with what follows them.

    Parameters
    ----------
    model : a network in eval mode without trainable parameters, see `bnfuse.freeze`; it shares its weights with the result, but
        for those of convolutions that have to be laid out anew
    sites : rules that say whose moments are wanted, see `bnfuse.sites`; default the inputs of all BatchNorm layers. Any other
        site takes one more read of its tensor, which backward needs too and keeps
    backend : which kernels run, see `bnfuse.backends`
    trace : False replaces the BatchNorm modules alone, as happens by itself (with a warning) where torch.fx fails
    memory_format : of images and activations [N, C, H, W] inside the network. Default torch.channels_last, in which
        convolutions are fastest, and for a network that could not be traced torch.preserve_format, the images' own: its code
        may hold a ``view`` that no other layout allows

    Raises
    ------
    InputError : the network is not fit to be a teacher, see `models.check_teacher`; a rule that nothing fits; a memory_format
        of no such layout
    """
    backends.check_name(backend)
    check_teacher(model, needs_batchnorm=any(SiteRule.parse(rule).kind == "bn" for rule in sites))
    if memory_format not in (None, torch.channels_last, torch.contiguous_format, torch.preserve_format):
        raise InputError(
            f"memory_format must be torch.channels_last, contiguous_format or preserve_format, got {memory_format!r}"
        )
    plan = _Plan.of(select(model, sites), backend)
    if trace:
        try:
            return _fuse_traced(model, plan, memory_format or torch.channels_last)
        except Exception as error:  # torch.fx reports a network it cannot follow with whatever that network raised
            reason = str(error).splitlines()[0] if str(error) else ""
            warnings.warn(
                f"{type(model).__name__} cannot be traced ({type(error).__name__}: {reason}); fusing its BatchNorm "
                "modules alone, activations and additions stay separate",
                stacklevel=2,
            )
    return _fuse_modules(model, plan, memory_format or torch.preserve_format)


@dataclass(frozen=True)
class _Plan:
    """What every part of a fused network is made with.

    Attributes
    ----------
    sites : all that are wanted; observers : of those that have no fused operator, by name
    """

    sites: list[Site]
    tape: Tape
    backend: str
    observers: dict[str, Observer]

    @classmethod
    def of(cls, sites: list[Site], backend: str) -> _Plan:
        tape = Tape()
        observers = {site.name: Observer(site, tape, backend) for site in sites if not site.batchnorm}
        return cls(sites, tape, backend, observers)

    def wants(self, batchnorm: str) -> bool:
        """Whether the input of this BatchNorm layer is a site."""
        return any(site.batchnorm and site.module_name == batchnorm for site in self.sites)


# ---- the sites ----


class _Site(nn.Module):
    """What fused and observed BatchNorm layers share: name, tape, backend, whether their input's moments are wanted, and the
    layer's running mean [C]."""

    def __init__(self, batchnorm: _BatchNorm, name: str, plan: _Plan):
        super().__init__()
        self.site_name, self.tape, self.backend, self.wanted = name, plan.tape, plan.backend, plan.wants(name)
        self.register_buffer("running_mean", batchnorm.running_mean)

    def extra_repr(self) -> str:
        return "moments only"


class FusedBatchNorm(_Site):
    """``act(BatchNorm(x) (+ residual))`` with the BatchNorm's running statistics, as one operator."""

    def __init__(self, batchnorm: _BatchNorm, name: str, plan: _Plan, act: Activation, has_residual: bool):
        super().__init__(batchnorm, name, plan)
        self.act, self.has_residual = act, has_residual
        scale = (batchnorm.running_var.double() + batchnorm.eps).rsqrt()  # [C]
        if batchnorm.weight is not None:
            scale = scale * batchnorm.weight.double()
        shift = -batchnorm.running_mean.double() * scale
        if batchnorm.bias is not None:
            shift = shift + batchnorm.bias.double()
        dtype = reference.moment_dtype(batchnorm.running_mean.dtype)
        self.register_buffer("scale", scale.detach().to(dtype))
        self.register_buffer("shift", shift.detach().to(dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, *spatial], residual like x → the same shape."""
        dtype = reference.moment_dtype(x.dtype)
        # A residual that broadcasts, or that autocast left in another dtype, is added outside.
        fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        y, mean, var = ops.bn_act_unchecked(
            x,
            residual if fits else None,
            self.scale.to(dtype),
            self.shift.to(dtype),
            self.tape.groups_of(x, self.site_name),
            self.act.name if fits else "identity",
            self.act.slope,
            self.backend,
        )
        if self.wanted:
            self.tape.record(self.site_name, x, mean, var)
        return y if fits else reference.activation(y + residual, self.act.name, self.act.slope)

    def extra_repr(self) -> str:
        parts = [
            "BN",
            *(["add"] if self.has_residual else []),
            *([self.act.name] if self.act.name != "identity" else []),
        ]
        return " + ".join(parts)


class ObservedBatchNorm(_Site):
    """A BatchNorm subclass whose forward is its own: it runs unchanged, its input's moments are taken beside it."""

    def __init__(self, batchnorm: _BatchNorm, name: str, plan: _Plan):
        super().__init__(batchnorm, name, plan)
        self.batchnorm = batchnorm

    def forward(self, x: Tensor) -> Tensor:
        if self.wanted:
            groups = self.tape.groups_of(x, self.site_name)
            self.tape.record(self.site_name, x, *ops.group_moments(x, groups, backend=self.backend))
        return self.batchnorm(x)


@dataclass(frozen=True)
class Activation:
    """One of `reference.ACTIVATIONS`, with leaky ReLU's slope."""

    name: str = "identity"
    slope: float = 0.01


_ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
}
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}


def _activation_of_module(module: nn.Module) -> Activation | None:
    name = _ACTIVATION_MODULES.get(type(module))
    return Activation(name, getattr(module, "negative_slope", 0.01)) if name else None


def _is_plain(batchnorm: _BatchNorm) -> bool:
    return type(batchnorm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _site(
    batchnorm: _BatchNorm, name: str, plan: _Plan, following: Activation = Activation(), has_residual: bool = False
) -> _Site:
    """The module that takes a BatchNorm's place, with what could be folded into it."""
    if _is_plain(batchnorm):
        return FusedBatchNorm(batchnorm, name, plan, following, has_residual)
    own = _own_activation(batchnorm)
    return ObservedBatchNorm(batchnorm, name, plan) if own is None else FusedBatchNorm(batchnorm, name, plan, own, False)


def _own_activation(batchnorm: _BatchNorm) -> Activation | None:
    """timm's BatchNormAct2d is BatchNorm, dropout, activation in one module; None for any other subclass."""
    if type(batchnorm).__name__ != "BatchNormAct2d" or not isinstance(getattr(batchnorm, "drop", None), nn.Identity):
        return None
    return _activation_of_module(batchnorm.act)


# ---- tracing and rewriting ----


def _observed(values: object, site: str) -> None:
    """Stands in a traced graph where `site` is observed, until its observer takes the place."""


class _Tracer(torch.fx.Tracer):
    """BatchNorm layers stay whole, also those whose class comes from outside torch.nn; what holds a site is entered, also
    where it is of torch.nn. Where an observed module is called the graph says so."""

    def __init__(self, observers: dict[str, Observer]):
        super().__init__()
        self.observed: dict[str, list[Site]] = {}  # by module
        for observer in observers.values():
            self.observed.setdefault(observer.site.module_name, []).append(observer.site)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, _BatchNorm):
            return True
        return super().is_leaf_module(module, qualified_name) and not any(
            name.startswith(qualified_name + ".") for name in self.observed
        )

    def call_module(self, module, forward, args, kwargs):
        sites = self.observed.get(self.path_of_module(module), ()) if self.observed else ()
        for site in sites:
            if site.end == "input":
                self._mark(site, (*args, *kwargs.values()))
        output = super().call_module(module, forward, args, kwargs)
        for site in sites:
            if site.end == "output":
                self._mark(site, output)
        return output

    def _mark(self, site: Site, values: object) -> None:
        if site.index == 0:  # then nothing else is used here, and may be folded away
            values = next(iter(leaves(values)), None)
        self.create_proxy("call_function", _observed, (values, site.name), {})


def _fuse_traced(model: nn.Module, plan: _Plan, memory_format: torch.memory_format) -> FusedModel:
    graph = _Tracer(plan.observers).trace(model)
    body = torch.fx.GraphModule(model, graph)
    modules = dict(model.named_modules())
    for node in list(graph.nodes):  # what does nothing in eval mode would only hide the chains
        if node.op == "call_module" and isinstance(modules[node.target], (nn.Identity, nn.Dropout, nn.Dropout2d)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_method" and node.target == "view" and not any(isinstance(a, torch.dtype) for a in node.args):
            node.target = "reshape"  # the same, in every layout
    _place_observers(graph, body, modules, plan)
    sites: dict[str, _Site] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules.get(node.target), _BatchNorm):
            name = call_name(node.target, sites)
            sites[name] = _fold(graph, body, modules, node, f"site_{len(sites)}", name, plan)
    body.delete_all_unused_submodules()
    graph.lint()
    freeze_convolutions(body, memory_format)
    body.recompile()
    body.eval()
    return FusedModel(body, plan, True, memory_format)


def _place_observers(graph: torch.fx.Graph, body: torch.fx.GraphModule, modules: dict[str, nn.Module], plan: _Plan) -> None:
    names = {name: f"observer_{i}" for i, name in enumerate(plan.observers)}

    def kept(value: torch.fx.Node) -> torch.fx.Node:
        """Backward needs the values as they are here, whatever is done to them in place later on."""
        return graph.call_method("clone", (value,)) if _is_changed(value, modules) else value

    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _observed:
            values, site = node.args
            if not hasattr(body, names[site]):
                body.add_submodule(names[site], plan.observers[site])
            with graph.inserting_before(node):
                graph.call_module(names[site], (torch.fx.node.map_arg(values, kept),))
            graph.erase_node(node)


_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_|i(?:add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)|setitem")


def _is_changed(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether something that is done to a node's tensor may write over it."""
    for user in node.users:
        if not user.args or user.args[0] is not node:
            continue
        if user.kwargs.get("inplace") or user.op == "call_module" and getattr(modules.get(user.target), "inplace", False):
            return True
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if user.op in ("call_method", "call_function") and _IN_PLACE.fullmatch(name):
            return True
    return False


def _fold(
    graph: torch.fx.Graph,
    body: torch.fx.GraphModule,
    modules: dict[str, nn.Module],
    node: torch.fx.Node,
    attribute: str,
    name: str,
    plan: _Plan,
) -> _Site:
    """Replaces a BatchNorm node, and the addition and activation that alone use it, by one site."""
    batchnorm, last, residual, act = modules[node.target], node, None, Activation()
    if _is_plain(batchnorm):
        add = _only_user(last)
        if add is not None and (other := _other_operand(add, last)) is not None:
            last, residual = add, other
        user = _only_user(last)
        if user is not None and (found := _activation_of_node(user, modules)) is not None:
            last, act = user, found
    site = _site(batchnorm, name.split("#")[0], plan, act, residual is not None)
    body.add_submodule(attribute, site)
    with graph.inserting_before(last):  # here the residual has been computed too
        fused = graph.call_module(attribute, (node.args[0],) if residual is None else (node.args[0], residual))
    last.replace_all_uses_with(fused)
    while last is not node:  # from the activation back to the BatchNorm
        previous = next(a for a in last.args if isinstance(a, torch.fx.Node) and a is not residual)
        graph.erase_node(last)
        last = previous
    graph.erase_node(node)
    return site


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_operand(add: torch.fx.Node, operand: torch.fx.Node) -> torch.fx.Node | None:
    """The tensor that `add` adds to `operand`; None if the node is no such addition."""
    in_place = add.target in (operator.iadd, "add_")
    is_add = (
        add.op == "call_function"
        and add.target in (operator.add, operator.iadd, torch.add)
        or add.op == "call_method"
        and add.target in ("add", "add_")
    )
    if not is_add or add.kwargs or len(add.args) != 2:
        return None
    left, right = add.args
    if left is right or not all(isinstance(a, torch.fx.Node) for a in add.args):
        return None
    if left is operand:
        return right
    return None if in_place else left  # `residual += y` changes the residual itself: leave it alone


def _activation_of_node(node: torch.fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        return _activation_of_module(modules[node.target]) if node.target in modules else None
    if node.op == "call_method":
        name = _ACTIVATION_METHODS.get(node.target)
    else:
        name = _ACTIVATION_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name is None:
        return None
    slope = node.kwargs.get("negative_slope", node.args[1] if name == "leaky_relu" and len(node.args) > 1 else 0.01)
    return Activation(name, slope)


def _fuse_modules(model: nn.Module, plan: _Plan, memory_format: torch.memory_format) -> FusedModel:
    """A copy of the network, weights shared, with every BatchNorm module replaced by a site, and hooks for other sites."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    body = copy.deepcopy(model, memo=shared)
    replaced: dict[_BatchNorm, _Site] = {}  # one layer may be registered under several names
    for name, module in list(body.named_modules(remove_duplicate=False)):
        if isinstance(module, _BatchNorm):
            if module not in replaced:
                replaced[module] = _site(module, name, plan)
            parent, _, attribute = name.rpartition(".")
            setattr(body.get_submodule(parent), attribute, replaced[module])
    freeze_convolutions(body, memory_format)
    for observer in plan.observers.values():
        if observer.site.module_name:
            hook_site(body, observer.site, observer)
    if plan.observers:  # backward needs what was observed as it was
        for module in body.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False
    body.eval()
    return FusedModel(body, plan, False, memory_format)
