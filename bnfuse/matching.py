"""Holds targets against a fused network's moments: the BatchNorm-statistic loss.

A `Matcher` has one table of targets, a row a class (or one row for all), and measures how far each group of a batch is from
the row of its class, or from a mixture of rows. It knows nothing of images or optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import backends, ops
from .averaging import MovingAverage
from .errors import InputError
from .models import batchnorm_layers
from .moments import Moments
from .reference import DISTANCES, EAGER_DISTANCES, bn_distance
from .sites import PIXELS, stem
from .statistics import ClassStatistics

BLENDS = ("targets", "distances")
_ROWS_AT_ONCE = 64  # of the statistics, in float64


class Matcher(nn.Module):
    """The weighted distance between a batch's moments and their targets.

    ``loss = mean over groups of reduce over sites of weight[s] · distance(moments[g, s], target[class of g, s])``

    Parameters
    ----------
    names : the sites to match, and the order of the tables' columns
    channels : channels of each site; their sum is T
    target_mean, target_var : [K, T], a row a class, or [1, T] for every group alike; kept in float32
    distance, use_std, eps, slack, mean_weight, var_weight : see `reference.bn_distance`; weights may be negative
    site_weights : by site name, default 1 each (DeepInversion multiplies its first site by 10)
    reduction : "sum" or "mean" over sites
    unbiased : the batch's variances are divided by M − 1, not M, of M elements a channel and group (0 where M = 1); the
        targets stay as they are
    relative : each distance is divided by that of an input of zeros from the same target, and sites are averaged, so that a
        weight found on one network will do on another; a site whose target is that of zeros has no part
    site_drop : share of the sites that `draw_sites` leaves out at random, or that of each by name; the layouts of one tensor
        fall together
    enhancement : how much more than the others group g counts at site g, counted around (DSG, arXiv 2103.01049, with groups of
        one sample: I + 11ᵀ)
    moving_average : of the moments from call to call, matched in their place
    backend : which kernels run, see `bnfuse.backends`
    """

    def __init__(
        self,
        names: Sequence[str],
        channels: Sequence[int],
        target_mean: Tensor,
        target_var: Tensor,
        *,
        distance: str = "l2",
        use_std: bool = False,
        eps: float = 1e-8,
        slack: float = 0.0,
        mean_weight: float = 1.0,
        var_weight: float = 1.0,
        site_weights: Mapping[str, float] | None = None,
        reduction: str = "sum",
        unbiased: bool = False,
        relative: bool = False,
        site_drop: float | Mapping[str, float] = 0.0,
        enhancement: float = 0.0,
        moving_average: MovingAverage | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        backends.check_name(backend)
        if distance not in (known := (*DISTANCES, *EAGER_DISTANCES)):
            raise InputError(f"unknown distance {distance!r}; choose one of {', '.join(known)}")
        if reduction not in ("sum", "mean"):
            raise InputError(f"reduction over sites must be 'sum' or 'mean', got {reduction!r}")
        drops = site_drop if isinstance(site_drop, Mapping) else dict.fromkeys(names, site_drop)
        for argument, given in (("site_weights", site_weights or {}), ("site_drop", drops)):
            if unknown := set(given) - set(names):
                raise InputError(f"{argument} names sites that are not matched: {', '.join(sorted(unknown))}")
        if wrong := [share for share in drops.values() if not 0 <= share < 1]:
            raise InputError(f"site_drop is a share of the sites, from 0 up to but not 1, got {wrong[0]}")
        shape = (len(target_mean), sum(channels))
        if target_mean.shape != shape or target_var.shape != shape or len(names) != len(channels):
            raise InputError(
                f"targets must be [K, {sum(channels)}] for {len(names)} sites, got {list(target_mean.shape)} "
                f"and {list(target_var.shape)}"
            )
        self.backend, self.unbiased, self.relative, self.enhancement = backend, unbiased, relative, enhancement
        self.moving_average = moving_average
        self.names, self.channels = list(names), list(channels)
        self.options = {
            "distance": distance,
            "use_std": use_std,
            "eps": eps,
            "slack": slack,
            "mean_weight": mean_weight,
            "var_weight": var_weight,
        }
        self._drops = [drops.get(name, 0.0) for name in names]
        share = 1 / len(names) if reduction == "mean" or relative else 1.0
        weights = [share * (site_weights or {}).get(name, 1.0) for name in names]
        self.register_buffer("site_weights", _exactly(weights))  # [S]
        self.register_buffer("site_channels", torch.tensor(self.channels))  # [S]
        self.register_buffer("target_mean", target_mean.to(torch.float32, copy=True))  # [K, T]
        self.register_buffer("target_var", target_var.to(torch.float32, copy=True))
        self.register_buffer("drawn", torch.ones(len(names)), persistent=False)  # [S], 0 for sites that are left out
        site_of = torch.arange(len(names)).repeat_interleave(torch.tensor(self.channels))
        self.register_buffer("_site_of", site_of, persistent=False)  # [T]
        self._positions: dict[tuple, Tensor] = {}  # positions, device, dtype → [S]
        self._global_share = 0.0
        self._pooled: tuple[Tensor, Tensor] | None = None  # float64 [1, T]: what `load_classes` blends with
        self.register_buffer("global_mean", None)  # [1, T] where distances from all classes' targets are blended with
        self.register_buffer("global_var", None)

    @classmethod
    def from_statistics(
        cls,
        statistics: ClassStatistics,
        *,
        per_class: bool = True,
        classes: Sequence[int] | None = None,
        sites: Sequence[str] | None = None,
        global_share: float = 0.0,
        global_blend: str = "targets",
        **options,
    ) -> Matcher:
        """Targets recorded from the private images: each class's own, or (`per_class=False`) all classes pooled.

        The class-wise targets are those of arXiv 2210.03205.

        Parameters
        ----------
        classes : the rows of the statistics that the table has, in their order; default all. Of sub-classes they are what the
            groups of a batch are matched to by number, see `ClassStatistics.row_classes`
        sites : names of those to match, in their order; default all that were recorded
        global_share : of all classes pooled, beside each class's own; 0.5 in EDC
        global_blend : "targets", mean is blended with mean and variance with variance; or "distances", the loss is blended of
            that with all classes' targets and that with each class's own, as EDC's code has it
        options : as the class takes them
        """
        channels = statistics.site_channels
        if unknown := [name for name in sites or () if name not in channels]:
            raise InputError(
                f"the class statistics have no site {', '.join(unknown[:5])}; they have {', '.join(channels)}. Record the "
                "sites that are to be matched (`bnfuse record --sites`)"
            )
        names = list(channels if sites is None else sites)
        if not 0 <= global_share <= 1:
            raise InputError(f"global_share must be from 0 to 1, got {global_share}")
        if global_blend not in BLENDS:
            raise InputError(f"global_blend must be one of {', '.join(BLENDS)}, got {global_blend!r}")
        classes = range(len(statistics.images)) if classes is None else classes
        blank = torch.zeros(1, sum(channels[name] for name in names)).expand(len(classes) if per_class else 1, -1)
        matcher = cls(names, [channels[name] for name in names], blank, blank, **options)
        if not per_class or global_share:
            pooled = statistics.moments(per_class=False, names=names)
        if per_class:
            if global_share:
                matcher._global_share = global_share
                if global_blend == "targets":
                    matcher._pooled = pooled
                else:
                    matcher.global_mean, matcher.global_var = (table.float() for table in pooled)
            matcher.load_classes(statistics, classes)
        else:
            matcher.target_mean.copy_(pooled[0])
            matcher.target_var.copy_(pooled[1])
        return matcher

    def load_classes(self, statistics: ClassStatistics, classes: Sequence[int]) -> None:
        """Puts the targets of these classes into the first rows of the table, wherever that is; the other rows stay."""
        for start in range(0, len(classes), _ROWS_AT_ONCE):
            rows = classes[start : start + _ROWS_AT_ONCE]
            targets = statistics.moments(classes=rows, names=self.names)  # float64 [rows, T] each
            if self._pooled is not None:
                targets = [torch.lerp(own, pooled, self._global_share) for own, pooled in zip(targets, self._pooled)]
            self.target_mean[start : start + len(rows)] = targets[0]
            self.target_var[start : start + len(rows)] = targets[1]

    @classmethod
    def from_running(
        cls, model: nn.Module, *, sites: Sequence[str] | None = None, pixel_channels: int = 3, **options
    ) -> Matcher:
        """Targets that nothing need be recorded for: a network's running_mean and running_var, as DeepInversion has them, and
        mean 0 and variance 1 of normalised pixels (ZeroQ).

        Parameters
        ----------
        sites : names of BatchNorm layers, or "pixels". Default all BatchNorm layers; leave out those that do not run in eval
            mode (auxiliary heads)
        pixel_channels : of the images
        options : as the class takes them
        """
        layers = batchnorm_layers(model)
        names = list(layers if sites is None else sites)
        if unknown := [name for name in names if name not in layers and name != PIXELS]:
            raise InputError(
                f"no BatchNorm layer named {', '.join(unknown[:5])}; the network has {', '.join(layers) or 'none'}. Sites "
                "other than BatchNorm inputs and pixels have no running statistics: record theirs (`bnfuse record --sites`)"
            )
        zeros = torch.zeros(pixel_channels)
        means = [layers[name].running_mean if name in layers else zeros for name in names]
        variances = [layers[name].running_var if name in layers else zeros + 1 for name in names]
        device = next((mean.device for mean in means if mean is not zeros), zeros.device)
        table = (torch.cat([value.to(device) for value in values])[None] for values in (means, variances))
        return cls(names, [len(mean) for mean in means], *table, **options)

    def scale_first_site(self, factor: float) -> None:
        """Multiplies the weight of the first site, in whatever layouts it is matched (DeepInversion's first_bn_multiplier)."""
        factors = [factor if stem(name) == stem(self.names[0]) else 1.0 for name in self.names]
        weights = [weight * f for weight, f in zip(self.site_weights.tolist(), factors)]
        self.site_weights = _exactly(weights).to(self.site_weights.device)

    @property
    def drops_sites(self) -> bool:
        return any(self._drops)

    def draw_sites(self, generator: torch.Generator | None = None) -> None:
        """Draws which sites `measure` leaves out until the next draw; `generator` is of the CPU, default torch's own."""
        if not self.drops_sites:
            return
        tensors = list(dict.fromkeys(map(stem, self.names)))
        chances = dict(zip(tensors, torch.rand(len(tensors), generator=generator).tolist()))
        kept = [float(chances[stem(name)] >= share) for name, share in zip(self.names, self._drops)]
        self.drawn.copy_(torch.tensor(kept))  # in place: a captured graph reads it

    def site_distances(self, moments: Moments, classes: Tensor | None = None) -> Tensor:
        """Each group's distance at each site, unweighted; a moving average is looked at and stays as it is.

        Parameters
        ----------
        moments : of a fused network, mean and var [G, C] a site
        classes : int64 [G], each group's class (a row of the table); or [G, K], weights of the table's rows in each group's
            target, mean with mean and variance with variance; None only where the table has one row

        Returns
        -------
        [G, S]
        """
        mean, var = (torch.cat(values, dim=1) for values in self._moments(moments, update=False))  # [G, T]
        parts = []
        for share, target_mean, target_var, of_group in self._targets(mean, classes):
            rows = torch.zeros(len(mean), dtype=torch.int64, device=mean.device) if of_group is None else of_group
            distances = bn_distance(mean, var, target_mean[rows], target_var[rows], self.site_channels, **self.options)
            parts.append(share * distances)
        return sum(parts[1:], start=parts[0])

    def forward(self, moments: Moments, classes: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The loss, a scalar, with sites drawn anew by `generator`; other arguments as in `site_distances`."""
        self.draw_sites(generator)
        return self.measure(moments, classes)[0]

    def measure(self, moments: Moments, classes: Tensor | None = None, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss with the sites that were drawn last, and each group's distance at each site, [G, S], unweighted and without
        gradient. A moving average takes the moments in.

        `weights` [G, S] multiply the sites' own, group by group.
        """
        mean, var = self._moments(moments)
        site_weights = self.site_weights.to(mean[0].dtype)
        if self.drops_sites:
            site_weights = site_weights * self.drawn
        if self.enhancement:
            sites = torch.arange(len(self.names), device=site_weights.device)
            of_group = torch.arange(len(mean[0]), device=sites.device)[:, None] % len(sites)
            more = 1 + self.enhancement * (of_group == sites).to(site_weights.dtype)  # [G, S]
            weights = more if weights is None else more * weights
        parts = [
            (share, *self._weighed(mean, var, *targets, site_weights, weights))
            for share, *targets in self._targets(mean[0], classes)
        ]
        if len(parts) == 1:
            return parts[0][1:]
        return sum(share * loss for share, loss, _ in parts), sum(share * distances for share, _, distances in parts)

    def _weighed(self, mean, var, target_mean, target_var, classes, site_weights, weights) -> tuple[Tensor, Tensor]:
        """Loss and distances from one table of targets; weights are [S], and [G, S] or None."""
        if self.relative:
            scale = self._scale(mean, target_mean, target_var, classes)  # [1, S] or [G, S]
            weights = scale if weights is None else scale * weights
        if weights is None:
            return self._loss(mean, var, target_mean, target_var, site_weights, classes)
        if len(weights) == 1:
            return self._loss(mean, var, target_mean, target_var, site_weights * weights[0], classes)
        # The operator has one weight a site: each group's sites are sites of their own, of one group.
        groups = len(mean[0])
        rows = [table[classes] if classes is not None else table.expand(groups, -1) for table in (target_mean, target_var)]
        loss, distances = self._loss(
            [row for g in range(groups) for row in (value[g : g + 1] for value in mean)],
            [row for g in range(groups) for row in (value[g : g + 1] for value in var)],
            *(row.reshape(1, -1) for row in rows),
            (site_weights * weights).flatten() / groups,
            None,
        )
        return loss, distances.view(groups, -1)

    def _loss(self, mean, var, target_mean, target_var, site_weights, classes) -> tuple[Tensor, Tensor]:
        options = {"classes": classes, "backend": self.backend, **self.options}
        try:
            return ops.bn_loss(mean, var, target_mean, target_var, site_weights, **options)
        except InputError:
            for name, channels, value in zip(self.names, self.channels, mean):
                if value.shape[1] != channels:
                    raise InputError(
                        f"site {name!r} has {value.shape[1]} channels or cells in this pass, its targets have {channels}: they "
                        "are of another network, or of images of another size"
                    ) from None
            raise

    def _scale(self, mean: list[Tensor], target_mean: Tensor, target_var: Tensor, classes: Tensor | None) -> Tensor:
        """1 / the distance of zeros from each group's target: [G, S], or [1, S] where all have one."""
        groups = 1 if len(target_mean) == 1 else len(mean[0])
        zeros = [torch.zeros_like(value[:groups]) for value in mean]
        _, distances = self._loss(zeros, zeros, target_mean, target_var, self.site_weights.to(zeros[0].dtype), classes)
        return torch.where(distances == 0, 0.0, 1 / distances.abs())

    def _targets(self, like: Tensor, classes: Tensor | None) -> list[tuple[float, Tensor, Tensor, Tensor | None]]:
        """Of each table: its share of the loss, the table in the moments' dtype, [K, T], and each group's row of it, or None
        where it has one row for all."""
        own = self._own_targets(like, classes)
        if self.global_mean is None:
            return [(1.0, *own)]
        pooled = self.global_mean.to(like.dtype), self.global_var.to(like.dtype), None
        return [(1 - self._global_share, *own), (self._global_share, *pooled)]

    def _own_targets(self, like: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, var = self.target_mean.to(like.dtype), self.target_var.to(like.dtype)
        if len(mean) == 1:
            return mean, var, None
        if classes is None:
            raise InputError("class-wise targets need the class of each group: pass classes, int64 [G]")
        if not classes.is_floating_point():
            return mean, var, classes
        if classes.shape != (len(like), len(mean)):
            raise InputError(
                f"a mixture of classes must be [{len(like)}, {len(mean)}], a weight for each group and row of the targets, got "
                f"{list(classes.shape)}"
            )
        with torch.autocast(like.device.type, enabled=False):
            mean, var = (classes.to(like.dtype) @ table for table in (mean, var))
        return mean, var, None if len(like) == 1 else torch.arange(len(like), device=like.device)

    def _moments(self, moments: Moments, update: bool = True) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The matched sites' means and variances as they are matched, [G, C] each."""
        if missing := [name for name in self.names if name not in moments]:
            raise InputError(
                f"the network did not run site {missing[0]!r} ({len(missing)} of {len(self.names)} missing); match "
                "only sites that run (sites=…), or record the statistics with this network"
            )
        mean, var = [moments[name][0] for name in self.names], [moments[name][1] for name in self.names]
        if not self.unbiased and self.moving_average is None:
            return mean, var
        mean, var = torch.cat(mean, dim=1), torch.cat(var, dim=1)  # [G, T]
        if self.unbiased:
            counts = self._counts(moments, var.dtype)[:, self._site_of]  # [G, T]
            var = var * (counts / (counts - 1).clamp(min=1))
        if self.moving_average is not None:
            mean, var = self.moving_average(mean, var, update=update)
        return mean.split(self.channels, dim=1), var.split(self.channels, dim=1)

    def _counts(self, moments: Moments, dtype: torch.dtype) -> Tensor:
        """Elements a channel of each group and site, [G, S]."""
        starts = getattr(moments, "group_starts", None)
        if starts is None:
            raise InputError("unbiased variances need the counts that a fused network's `Moments` come with, got a plain dict")
        positions = [moments.positions[name] for name in self.names]
        key = (*positions, starts.device, dtype)
        if key not in self._positions:  # made once for each size of images: a captured graph copies nothing from the host
            self._positions[key] = torch.tensor(positions, dtype=dtype, device=starts.device)
        return starts.diff()[:, None].to(dtype) * self._positions[key]


def _exactly(values: list[float]) -> Tensor:
    """[S] in float32, which the moments mostly are; in float64 where that would round."""
    wide = torch.tensor(values, dtype=torch.float64)
    narrow = wide.float()
    return narrow if narrow.double().equal(wide) else wide


def group_by_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The runs of equal labels in a batch that is sorted by class.

    Parameters
    ----------
    labels : int64 [N]

    Returns
    -------
    group_starts : int64 [G + 1]; classes : int64 [G]

    Raises
    ------
    InputError : a class appears in two separate runs, so that its statistics would be taken of parts
    """
    classes, counts = torch.unique_consecutive(labels, return_counts=True)
    if len(classes.unique()) != len(classes):
        raise InputError(
            "the batch is not sorted by class; sort it (labels.argsort(stable=True)) so that each class is one run"
        )
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), classes
