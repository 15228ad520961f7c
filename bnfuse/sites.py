"""Sites: which tensors of a network are matched or recorded, and how each is laid out for its moments.

A rule is text, so that it can stand on a command line and on a dataset's card: `SITE_GRAMMAR`. Nothing here computes moments.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import InputError

SITE_GRAMMAR = """\
A rule names sites by KIND[:input|:output[:INDEX]][@LAYOUT]
  KIND    bn              every BatchNorm layer
          conv            every Conv1d, Conv2d and Conv3d
          pixels          the images that the network is given
          type=CLASS      every module of a class, or of one derived from it: type=GroupNorm
          name=PATTERN    every module whose name fits a shell pattern: name=layer1.*.conv1
  INDEX   which tensor of several, from 0, nested tuples and keyword arguments counted through
  LAYOUT  channels        [N, C, *spatial], also [N, C] (default)
          last            [N, *spatial, C], such as the tokens [B, N, C] of a transformer
          cells=K         images [N, C, H, W] in cells of K×K positions, brought to whole cells by bilinear interpolation: a
                          cell takes the channels' place, its moments are over samples, channels and positions (G-VBSM,
                          arXiv 2311.17950)
and a site is the input of what is named, unless the rule says :output
"""
PIXELS = "pixels"
_RULE = re.compile(
    r"(bn|conv|pixels|type=[^:@]+|name=[^:@]+)"  # KIND
    r"(?::(input|output)(?::(\d+))?)?"
    r"(?:@(channels|last|cells=[1-9]\d*))?"
)


@dataclass(frozen=True)
class SiteRule:
    """A rule taken apart.

    Attributes
    ----------
    kind : "bn", "conv", "pixels", "type" or "name"; pattern : what follows "type=" or "name="
    end : "input" or "output"; index : of the tensor there
    layout : "channels", "last" or "cells"; cells : positions along each side of a cell
    """

    kind: str
    pattern: str = ""
    end: str = "input"
    index: int = 0
    layout: str = "channels"
    cells: int = 0

    @classmethod
    def parse(cls, text: str) -> SiteRule:
        """InputError where the text is no rule."""
        found = _RULE.fullmatch(text)
        if found is None or text.startswith("pixels:"):
            raise InputError(
                f"{text!r} names no sites: expected KIND[:input|:output[:INDEX]][@LAYOUT], where KIND is bn, conv, pixels, "
                "type=CLASS or name=PATTERN and LAYOUT is channels, last or cells=K; for example bn, conv:output, "
                "type=GroupNorm, name=blocks.*.norm1@last"
            )
        kind, _, pattern = found[1].partition("=")
        layout, _, cells = (found[4] or "channels").partition("=")
        return cls(kind, pattern, found[2] or "input", int(found[3] or 0), layout, int(cells or 0))

    def fits(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this name is meant."""
        if self.kind == "bn":
            return isinstance(module, _BatchNorm)
        if self.kind == "conv":
            return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if self.kind == "type":
            return self.pattern in (c.__name__ for c in type(module).__mro__)
        return self.kind == "name" and fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Site:
    """One tensor of a network.

    Attributes
    ----------
    name : key of its moments. A BatchNorm layer's input has the layer's name, "layer1.0.bn1", the images are "pixels", any
        other is "conv1:input", "gn:output", "attn:input:1"; a layout that is not the default follows: "conv1:input@cells=16"
    module_name : of the module that it is an input or output of; "" for the images
    end, index, layout, cells : as in `SiteRule`
    batchnorm : whether it is a BatchNorm layer's input, laid out as that takes it: what `fuse` has one operator for
    """

    name: str
    module_name: str
    end: str = "input"
    index: int = 0
    layout: str = "channels"
    cells: int = 0
    batchnorm: bool = False

    @classmethod
    def of(cls, rule: SiteRule, module_name: str, module: nn.Module) -> Site:
        if rule.kind == PIXELS:
            name, batchnorm = PIXELS, False
        else:
            input_of_batchnorm = isinstance(module, _BatchNorm) and rule.end == "input"
            batchnorm = input_of_batchnorm and (rule.index, rule.layout) == (0, "channels")
            name = module_name if input_of_batchnorm else f"{module_name}:{rule.end}"
        index = f":{rule.index}" if rule.index else ""
        cells = f"={rule.cells}" if rule.cells else ""
        layout = "" if rule.layout == "channels" else f"@{rule.layout}{cells}"
        return cls(name + index + layout, module_name, rule.end, rule.index, rule.layout, rule.cells, batchnorm)

    def pick(self, values: object) -> Tensor:
        """The site's tensor among a module's inputs or outputs. InputError where there is none."""
        tensors = list(leaves(values))
        if self.index >= len(tensors) or not isinstance(tensors[self.index], Tensor):
            kinds = ", ".join(type(value).__name__ for value in tensors) or "nothing"
            raise InputError(f"site {self.name!r} asks for number {self.index} of the {self.end}s, which are {kinds}")
        return tensors[self.index]

    def arrange(self, x: Tensor) -> Tensor:
        """x as [N, C, *spatial], ready for `ops.group_moments`. InputError where the layout does not fit."""
        if not x.is_floating_point() or not 2 <= x.dim() <= 5 or self.layout == "cells" and x.dim() != 4:
            expected = "[N, C, H, W]" if self.layout == "cells" else "2 to 5 dimensions"
            raise InputError(f"site {self.name!r} is {x.dtype} {list(x.shape)}; expected floating-point values, {expected}")
        if self.layout == "last":
            return x.movedim(-1, 1)
        return _in_cells(x, self.cells) if self.layout == "cells" else x


def stem(name: str) -> str:
    """The name of a site without its layout: what the layouts of one tensor have in common."""
    return name.split("@")[0]


def _in_cells(x: Tensor, k: int) -> Tensor:
    """[N, C, H, W] → [N, cells, C·k, k]."""
    n, c, *size = x.shape
    rows, columns = (-(-length // k) for length in size)
    if (rows * k, columns * k) != tuple(size):
        x = F.interpolate(x, (rows * k, columns * k), mode="bilinear", align_corners=False)
    cells = x.reshape(n, c, rows, k, columns, k).permute(0, 2, 4, 1, 3, 5)  # [N, rows, columns, C, k, k]
    return cells.reshape(n, rows * columns, c * k, k)


def leaves(values: object) -> Iterable[object]:
    """What is in nested tuples, lists and dictionaries, in order."""
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from leaves(value)
    else:
        yield values


def select(model: nn.Module, rules: Sequence[str]) -> list[Site]:
    """The sites that the rules name: the images first, then in the order of the network's modules.

    Raises
    ------
    InputError : a rule that is none, or that nothing in the network fits
    """
    parsed = [SiteRule.parse(rule) for rule in rules]
    if not parsed:
        raise InputError("no sites are named; give at least one rule, such as bn")
    sites = [Site.of(rule, "", model) for rule in parsed if rule.kind == PIXELS]
    for name, module in model.named_modules():
        if name:
            here = [Site.of(rule, name, module) for rule in parsed if rule.fits(name, module)]
            sites += sorted(here, key=lambda site: site.end)  # inputs are there before outputs
    for text, rule in zip(rules, parsed):
        if rule.kind != PIXELS and not any(rule.fits(name, module) for name, module in model.named_modules() if name):
            if rule.kind == "bn":
                raise InputError(f"{type(model).__name__} has no BatchNorm layer: {other_sites(model)}")
            raise InputError(f"nothing in {type(model).__name__} fits the rule {text!r}; it has {_inventory(model, rule)}")
    return list({site.name: site for site in sites}.values())


def other_sites(model: nn.Module) -> str:
    """In words, what can be matched of a network without BatchNorm."""
    norms = Counter(type(m) for m in model.modules() if "Norm" in type(m).__name__ and not any(m.children()))
    if not norms:
        return "match other sites of it (sites, on the command line --sites), for example conv"
    found = ", ".join(f"{kind.__name__} ({count})" for kind, count in norms.items())
    rules = [f"type={kind.__name__}{'@last' if kind is nn.LayerNorm else ''}" for kind in norms]
    return f"it has {found}, which can be matched as sites=({', '.join(map(repr, rules))},), --sites {' '.join(rules)}"


def _inventory(model: nn.Module, rule: SiteRule) -> str:
    if rule.kind == "name":
        names = [name for name, _ in model.named_modules() if name]
        return "modules named " + ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    kinds = Counter(type(module).__name__ for name, module in model.named_modules() if name)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()) or "no modules"


def call_name(name: str, taken) -> str:
    """`name` for a site's first call in a pass, then ``name#2``, ``name#3``, …"""
    if name not in taken:
        return name
    k = 2
    while f"{name}#{k}" in taken:
        k += 1
    return f"{name}#{k}"


class Observation:
    """Hooks that show a network's sites as they run; `remove` takes them off, and so does leaving a ``with`` block."""

    def __init__(self, handles: list):
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def observe(model: nn.Module, sites: Iterable[Site], callback: Callable[[Site, Tensor], None]) -> Observation:
    """Calls `callback` with each site and its tensor [N, C, *spatial], whenever the network, as it is, runs it."""
    return Observation([hook_site(model, site, _Shown(site, callback)) for site in sites])


class _Shown:
    def __init__(self, site: Site, callback: Callable[[Site, Tensor], None]):
        self.site, self.callback = site, callback

    def __call__(self, values: object) -> None:
        self.callback(self.site, self.site.arrange(self.site.pick(values)))


def hook_site(model: nn.Module, site: Site, take: Callable[[object], None]):
    """A hook that gives `take` all inputs or outputs of the site's module, whenever it runs; returns its handle."""
    module = model.get_submodule(site.module_name)
    if site.end == "input":
        return module.register_forward_pre_hook(_InputHook(take), with_kwargs=True)
    return module.register_forward_hook(_OutputHook(take))


class _InputHook:
    """A class and no closure, so that a network with hooks can be pickled."""

    def __init__(self, take: Callable[[object], None]):
        self.take = take

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.take((*args, *kwargs.values()))


class _OutputHook:
    def __init__(self, take: Callable[[object], None]):
        self.take = take

    def __call__(self, _module: nn.Module, _args: tuple, output: object) -> None:
        self.take(output)
