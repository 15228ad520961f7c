"""How statistics are matched, as flat fields: every option of the loss, under one name in Python, on the command line and on a
dataset's card. docs/matching.md has them in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .averaging import GRADIENTS, STARTS, MovingAverage
from .errors import InputError
from .matching import BLENDS
from .reference import DISTANCES, EAGER_DISTANCES
from .sites import SiteRule, select

TARGETS = ("class", "global", "running")
GROUPS = ("auto", "class", "batch", "sample")
REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class MatchingConfig:
    """Which statistics are matched, to what, and how far from it they are.

    Attributes
    ----------
    sites : rules that name what is matched, KIND[:input|:output[:INDEX]][@LAYOUT] with KIND bn, conv, pixels, type=CLASS or
        name=PATTERN and LAYOUT channels, last or cells=K: see docs/matching.md
    groups : what has statistics of its own: each class of a batch, the batch, or each sample; auto is class for targets of
        classes, else batch. A batch of several classes is matched to the mixture of their targets
    targets : statistics to match: each class's own, all classes pooled (global), or the network's running averages
        (running, needs no recording)
    global_share : of all classes pooled, beside the targets of each class (EDC has 0.5)
    global_blend : what is blended of the two, their targets or the distances from them (EDC's code)
    distance : distance between statistics: see `reference.bn_distance`
    use_std : compare standard deviations, not variances
    distance_eps : added to variances under a root or a logarithm
    unbiased : divide the images' variances by one less than their elements
    slack : what the hinge distance forgives
    mean_weight, var_weight : weights of the means' and the variances' distance, also negative
    site_reduction : sum or mean over sites
    relative : divide each distance by that of an input of zeros, and average over sites, so that bn_weight carries over from
        one network to another
    first_site_weight : weight of the first site, where the other sites have 1; it alone sees the pixels' statistics
    site_drop : share of sites that each step leaves out at random
    drop_sites : rules that name which sites may be left out (default all)
    site_enhancement : how much more than the others sample i of groups of samples counts at site i (DSG: 1)
    moving_average : momentum of a moving average of the statistics over steps, matched in their place; 0 for none
    moving_average_gradient : scaled by 1 − momentum, or straight_through, the batch's at full weight
    moving_average_start : the average begins at zero, or with the first batch (first)

    Raises
    ------
    InputError : a value out of its range; the message names the field
    """

    sites: tuple[str, ...] = ("bn",)
    groups: str = "auto"
    targets: str = "class"
    global_share: float = 0.0
    global_blend: str = "targets"
    distance: str = "l2"
    use_std: bool = False
    distance_eps: float = 1e-8
    unbiased: bool = False
    slack: float = 0.0
    mean_weight: float = 1.0
    var_weight: float = 1.0
    site_reduction: str = "sum"
    relative: bool = False
    first_site_weight: float = 10.0
    site_drop: float = 0.0
    drop_sites: tuple[str, ...] | None = None
    site_enhancement: float = 0.0
    moving_average: float = 0.0
    moving_average_gradient: str = "scaled"
    moving_average_start: str = "zero"

    def __post_init__(self):
        for name in ("mean_weight", "var_weight", "first_site_weight"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("distance_eps", "slack", "site_enhancement"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("site_drop", "moving_average"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 up to but not 1, got {getattr(self, name)}")
        if not 0 <= self.global_share <= 1:
            raise InputError(f"global_share must be from 0 to 1, got {self.global_share}")
        if self.global_share and self.targets != "class":
            raise InputError(f"global_share is a part of targets='class', got targets={self.targets!r}")
        if self.site_enhancement and self.groups != "sample":
            raise InputError(f"site_enhancement is for groups='sample', got groups={self.groups!r}")
        allowed_values = {
            "groups": GROUPS,
            "targets": TARGETS,
            "global_blend": BLENDS,
            "distance": (*DISTANCES, *EAGER_DISTANCES),
            "site_reduction": REDUCTIONS,
            "moving_average_gradient": GRADIENTS,
            "moving_average_start": STARTS,
        }
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for rule in (*self.sites, *(self.drop_sites or ())):
            SiteRule.parse(rule)
        if self.drop_sites and not self.site_drop:
            raise InputError(
                f"drop_sites={' '.join(self.drop_sites)} (--drop-sites) needs a site_drop (--site-drop) above 0, the share of "
                "them that each step leaves out"
            )

    @property
    def grouping(self) -> str:
        """ "class", "batch" or "sample"."""
        return ("class" if self.targets == "class" else "batch") if self.groups == "auto" else self.groups

    def matcher_options(self, model: nn.Module, names: Sequence[str]) -> dict:
        """The options of a `Matcher` for these sites of a network; but for `scale_first_site`."""
        drops = {}
        if self.site_drop:
            may_go = {site.name for site in select(model, self.drop_sites or self.sites)}
            drops = {name: self.site_drop for name in names if name.split("#")[0] in may_go}
            if not drops:
                raise InputError(
                    f"drop_sites={' '.join(self.drop_sites or ())} (--drop-sites) names none of the sites that are matched, "
                    f"which are those of {' '.join(self.sites)}: name some of these, or leave site_drop out"
                )
        average = None
        if self.moving_average:
            average = MovingAverage(self.moving_average, self.moving_average_gradient, self.moving_average_start)
        return {
            "distance": self.distance,
            "use_std": self.use_std,
            "eps": self.distance_eps,
            "slack": self.slack,
            "mean_weight": self.mean_weight,
            "var_weight": self.var_weight,
            "reduction": self.site_reduction,
            "unbiased": self.unbiased,
            "relative": self.relative,
            "site_drop": drops,
            "enhancement": self.site_enhancement,
            "moving_average": average,
        }
