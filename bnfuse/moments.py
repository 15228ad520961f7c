"""What one pass through a network yields: the moments of its sites, and how many elements they are of."""

from __future__ import annotations

import math

from torch import Tensor, nn

from . import ops
from .errors import InputError
from .sites import Site, call_name


class Moments(dict):
    """site name → mean, var [G, C], in the order the sites ran.

    Attributes
    ----------
    positions : site name → elements a channel that each sample has
    group_starts : int64 [G + 1], the groups of samples; None where it is not known
    """

    def __init__(self, pairs=(), positions: dict[str, int] | None = None, group_starts: Tensor | None = None):
        super().__init__(pairs)
        self.positions: dict[str, int] = {} if positions is None else positions
        self.group_starts = group_starts


class Tape:
    """Hands the groups to the sites of one forward pass and collects their moments."""

    def __init__(self):
        self.samples = 0
        self.moments = Moments()

    def start(self, group_starts: Tensor, samples: int) -> None:
        self.samples, self.moments = samples, Moments(group_starts=group_starts)

    def groups_of(self, x: Tensor, site: str) -> Tensor:
        """int64 [G + 1]: the groups of x's samples, which must be those of the network's images."""
        if len(x) != self.samples:
            raise InputError(
                f"site {site!r} has {len(x)} samples in a pass over {self.samples} images; networks that take "
                "their batch apart cannot be matched by groups of samples"
            )
        return self.moments.group_starts

    def record(self, site: str, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """The moments [G, C] of x [N, C, *spatial]."""
        name = call_name(site, self.moments)
        self.moments[name] = (mean, var)
        self.moments.positions[name] = math.prod(x.shape[2:])

    def finish(self) -> Moments:
        moments, self.moments = self.moments, Moments()  # the tape must not keep the graph alive
        return moments


class Observer(nn.Module):
    """Puts one site's moments on the tape, by an operator of its own, and leaves the tensor as it is.

    Called with whatever the module has for inputs or outputs.
    """

    def __init__(self, site: Site, tape: Tape, backend: str):
        super().__init__()
        self.site, self.tape, self.backend = site, tape, backend

    def forward(self, values: object) -> None:
        x = self.site.arrange(self.site.pick(values))
        groups = self.tape.groups_of(x, self.site.name)
        self.tape.record(self.site.name, x, *ops.group_moments(x, groups, backend=self.backend))

    def extra_repr(self) -> str:
        return self.site.name
