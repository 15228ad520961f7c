"""Holds targets against a fused network's moments: the BatchNorm-statistic loss.

A `Matcher` has one table of targets, a row a class (or one row for all), and measures how far each group of a batch is from
the row of its class. It knows nothing of images or optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import backends, ops
from .errors import InputError
from .fusion import Moments
from .models import batchnorm_layers
from .reference import DISTANCES, EAGER_DISTANCES, bn_distance
from .statistics import ClassStatistics

_ROWS_AT_ONCE = 64  # of the statistics, in float64


class Matcher(nn.Module):
    """The weighted distance between a batch's moments and their targets.

    ``loss = mean over groups of reduce over sites of weight[s] · distance(moments[g, s], target[class of g, s])``

    Parameters
    ----------
    names : the sites to match, and the order of the tables' columns
    channels : channels of each site; their sum is T
    target_mean, target_var : [K, T], a row a class, or [1, T] for every group alike; kept in float32 (or float64)
    distance, use_std, slack, mean_weight, var_weight : see `reference.bn_distance`
    site_weights : by site name, default 1 each (DeepInversion multiplies its first site by 10)
    reduction : "sum" or "mean" over sites
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
        slack: float = 0.0,
        mean_weight: float = 1.0,
        var_weight: float = 1.0,
        site_weights: Mapping[str, float] | None = None,
        reduction: str = "sum",
        backend: str = "auto",
    ):
        super().__init__()
        backends.check_name(backend)
        if distance not in (known := (*DISTANCES, *EAGER_DISTANCES)):
            raise InputError(f"unknown distance {distance!r}; choose one of {', '.join(known)}")
        if reduction not in ("sum", "mean"):
            raise InputError(f"reduction over sites must be 'sum' or 'mean', got {reduction!r}")
        if unknown := set(site_weights or {}) - set(names):
            raise InputError(f"site_weights names sites that are not matched: {', '.join(sorted(unknown))}")
        shape = (len(target_mean), sum(channels))
        if target_mean.shape != shape or target_var.shape != shape or len(names) != len(channels):
            raise InputError(
                f"targets must be [K, {sum(channels)}] for {len(names)} sites, got {list(target_mean.shape)} "
                f"and {list(target_var.shape)}"
            )
        self.backend = backend
        self.names, self.channels = list(names), list(channels)
        self.options = {
            "distance": distance,
            "use_std": use_std,
            "slack": slack,
            "mean_weight": mean_weight,
            "var_weight": var_weight,
        }
        weights = torch.tensor([(site_weights or {}).get(name, 1.0) for name in names])
        self.register_buffer("site_weights", weights / (len(names) if reduction == "mean" else 1))  # [S]
        self.register_buffer("site_channels", torch.tensor(self.channels))  # [S]
        self.register_buffer("target_mean", target_mean.to(torch.float32, copy=True))  # [K, T]
        self.register_buffer("target_var", target_var.to(torch.float32, copy=True))

    @classmethod
    def from_statistics(
        cls, statistics: ClassStatistics, *, per_class: bool = True, classes: Sequence[int] | None = None, **options
    ) -> Matcher:
        """Targets recorded from the private images: each class's own, or (`per_class=False`) all classes pooled.

        The class-wise targets are those of arXiv 2210.03205. `classes` are the rows of the table, in their order; default all.
        """
        classes = range(statistics.num_classes) if classes is None else classes
        blank = torch.zeros(1, sum(statistics.site_channels.values())).expand(len(classes) if per_class else 1, -1)
        matcher = cls(list(statistics.sites), list(statistics.site_channels.values()), blank, blank, **options)
        if per_class:
            matcher.load_classes(statistics, classes)
        else:
            mean, var = statistics.moments(per_class=False)
            matcher.target_mean.copy_(mean)
            matcher.target_var.copy_(var)
        return matcher

    def load_classes(self, statistics: ClassStatistics, classes: Sequence[int]) -> None:
        """Puts the targets of these classes into the first rows of the table, wherever that is; the other rows stay."""
        for start in range(0, len(classes), _ROWS_AT_ONCE):
            rows = classes[start : start + _ROWS_AT_ONCE]
            mean, var = statistics.moments(classes=rows)  # float64 [rows, T]
            self.target_mean[start : start + len(rows)] = mean
            self.target_var[start : start + len(rows)] = var

    @classmethod
    def from_running(cls, model: nn.Module, *, sites: Sequence[str] | None = None, **options) -> Matcher:
        """Targets from a network's running_mean and running_var, as DeepInversion has them: nothing need be recorded.

        `sites` leaves out layers that do not run in eval mode (auxiliary heads); default all BatchNorm layers.
        """
        layers = batchnorm_layers(model)
        if unknown := [name for name in sites or () if name not in layers]:
            raise InputError(f"no BatchNorm layer named {', '.join(unknown[:5])}; the network has {', '.join(layers)}")
        layers = {name: layers[name] for name in (sites if sites is not None else layers)}
        mean = torch.cat([layer.running_mean for layer in layers.values()])[None]
        var = torch.cat([layer.running_var for layer in layers.values()])[None]
        return cls(list(layers), [layer.num_features for layer in layers.values()], mean, var, **options)

    def site_distances(self, moments: Moments, classes: Tensor | None = None) -> Tensor:
        """Each group's distance at each site, unweighted.

        Parameters
        ----------
        moments : of a fused network, mean and var [G, C] a site
        classes : int64 [G], each group's class (a row of the table); None only where the table has one row

        Returns
        -------
        [G, S]
        """
        mean, var = self._moments(moments)
        mean, var = torch.cat(mean, dim=1), torch.cat(var, dim=1)  # [G, T]
        if len(self.target_mean) == 1:
            target_mean, target_var = self.target_mean.expand_as(mean), self.target_var.expand_as(var)
        elif classes is None:
            raise InputError("class-wise targets need the class of each group: pass classes, int64 [G]")
        else:
            target_mean, target_var = self.target_mean[classes], self.target_var[classes]
        return bn_distance(mean, var, target_mean.to(mean.dtype), target_var.to(var.dtype), self.site_channels, **self.options)

    def forward(self, moments: Moments, classes: Tensor | None = None) -> Tensor:
        """The loss, a scalar; arguments as in `site_distances`."""
        return self.measure(moments, classes)[0]

    def measure(self, moments: Moments, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and with it each group's distance at each site, [G, S], unweighted and without gradient."""
        mean, var = self._moments(moments)
        dtype = mean[0].dtype
        targets = self.target_mean.to(dtype), self.target_var.to(dtype), self.site_weights.to(dtype)
        return ops.bn_loss(mean, var, *targets, classes=classes, backend=self.backend, **self.options)

    def _moments(self, moments: Moments) -> tuple[list[Tensor], list[Tensor]]:
        """The matched sites' means and variances, [G, C] each."""
        if missing := [name for name in self.names if name not in moments]:
            raise InputError(
                f"the network did not run site {missing[0]!r} ({len(missing)} of {len(self.names)} missing); match "
                "only sites that run (sites=…), or record the statistics with this network"
            )
        return [moments[name][0] for name in self.names], [moments[name][1] for name in self.names]


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
