"""What the images are optimised for: the weighted sum of cross-entropy, BatchNorm-statistic loss and image priors."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from . import priors
from .fusion import FusedModel
from .matching import Matcher


@dataclass(frozen=True)
class Objective:
    """``total = ce·CE(logits, labels) + bn·BN loss + tv·total variation + l2·‖pixels‖²`` (DeepInversion, arXiv 1912.08795,
    eqs. 1–4, with the class-wise targets of arXiv 2210.03205).

    Terms whose weight is 0 are not computed, but for the BN loss, which costs nothing.
    """

    teacher: FusedModel
    matcher: Matcher
    ce_weight: float = 1.0
    bn_weight: float = 1.0
    tv_weight: float = 0.0
    l2_weight: float = 0.0

    def __call__(
        self, images: Tensor, view: Tensor, labels: Tensor, group_starts: Tensor, group_classes: Tensor
    ) -> dict[str, Tensor]:
        """The loss terms of one batch, unweighted scalars, and their weighted sum under "total".

        Parameters
        ----------
        images : [N, C, H, W], normalised; the priors look at these
        view : like images, what the teacher sees
        labels : int64 [N], sorted by class
        group_starts, group_classes : of the labels, see `matching.group_by_class`
        """
        logits, moments = self.teacher(view, group_starts)
        terms = {"bn": self.matcher(moments, group_classes)}
        if self.ce_weight:
            terms["ce"] = F.cross_entropy(logits.float(), labels)
        if self.tv_weight:
            terms["tv"] = priors.total_variation(images)
        if self.l2_weight:
            terms["l2"] = priors.l2(images)
        terms["total"] = sum(getattr(self, f"{name}_weight") * value for name, value in terms.items())
        return terms
