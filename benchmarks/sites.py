"""The networks that are timed, and their BatchNorm sites at real shapes.

No shape is typed by hand: each network runs once, fused, on the meta device, and every site that it passes is noted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from bnfuse import freeze, fuse
from bnfuse.fusion import FusedBatchNorm
from bnfuse.networks import CifarResNet

# The tolerances of the tests, and the import of torchvision beside a torch that its compiled operators do not fit.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Network:
    """A network and its images, [batch, 3, size, size]: how many for the shapes of its sites, for a step, for a quick step."""

    build: Callable[[], nn.Module]
    size: int
    batch: int
    step_batch: int
    quick_step_batch: int


def _torchvision() -> ModuleType:
    try:
        import torchvision
    except RuntimeError:
        from torchvision_shim import import_torchvision

        torchvision = import_torchvision()
    return torchvision


NETWORKS = {
    "resnet20": Network(lambda: CifarResNet(20), 32, 256, 256, 256),
    "resnet18": Network(lambda: _torchvision().models.resnet18(), 224, 16, 16, 8),
    "resnet50": Network(lambda: _torchvision().models.resnet50(), 224, 16, 8, 4),
    "mobilenet_v2": Network(lambda: _torchvision().models.mobilenet_v2(), 224, 16, 16, 4),
}


@dataclass(frozen=True)
class Site:
    """One BatchNorm layer as it is called: ``act(BN(x) (+ residual))`` with x [N, C, H, W]."""

    shape: tuple[int, ...]
    act: str
    has_residual: bool

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + ("-add" if self.has_residual else "") + f"-{self.act}"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def passes(self, direction: str) -> int:
        """How often a tensor of x's size must cross the memory bus, at least.

        forward: x is read and y written, 2; a residual is read, +1. backward: dy and x are read and dx written, 3; the
        residual's gradient is written, +1, unless there is no activation: then it is dy itself. The bits that tell on which
        side of a kink an element stood are 1/32 of a float32 pass and not counted.
        """
        forward = 2 + self.has_residual
        backward = 3 + (self.has_residual and self.act != "identity")
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def sites_of(name: str, batch: int | None = None) -> Counter[Site]:
    """A network's sites at its full batch or the one given, equal ones counted."""
    network, sites = NETWORKS[name], Counter()
    fused = fuse(freeze(network.build())).to("meta")
    for module in fused.modules():
        if isinstance(module, FusedBatchNorm):
            module.register_forward_pre_hook(
                lambda site, inputs: sites.update([Site(tuple(inputs[0].shape), site.act.name, site.has_residual)])
            )
    fused(torch.empty(batch or network.batch, 3, network.size, network.size, device="meta"))
    return sites


def all_sites(networks: Iterable[str] = NETWORKS, batch: int | None = None) -> dict[Site, dict[str, int]]:
    """Every site of the networks → how many of it each network has."""
    counts: dict[Site, dict[str, int]] = {}
    for name in networks:
        for site, count in sites_of(name, batch).items():
            counts.setdefault(site, {})[name] = count
    return counts


QUICK_SITE_BYTES = 64 * 2**20


def quick_sites(counts: dict[Site, dict[str, int]]) -> dict[Site, bool]:
    """The two sites of each network with most of its bytes, none above 64 MiB in float32; whether to compile for it, too.

    The one with more is: compilation is what takes long.
    """
    chosen: dict[Site, bool] = {}
    for name in dict.fromkeys(name for networks in counts.values() for name in networks):
        fitting = [site for site in counts if name in counts[site] and 4 * site.elements <= QUICK_SITE_BYTES]
        first, second = sorted(fitting, key=lambda site: counts[site][name] * site.elements, reverse=True)[:2]
        chosen[first] = True
        chosen.setdefault(second, False)
    return chosen
