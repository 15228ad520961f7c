"""WMDD's hooks: several classes a batch, the same number of images each, one class after the other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from .batchnorm import BatchNormHook
from .lpld import check_table


class BNFeatureHook_new(BatchNormHook):  # noqa: N801
    """`BatchNormHook` of each class's images against that class's statistics, the mean over classes.

    Parameters
    ----------
    module, process_group, backend : see `BatchNormHook`. With `per_class_bn` the layer has ``running_mean_per_class`` and
        ``running_var_per_class``, [K, C]; WMDD's own `BatchNorm2dWithPerClassStats` is fused as well
    per_class_bn : False is the plain hook
    ipc : images of each class in the batch
    start, end : the batch holds the classes start … end − 1, in this order
    weights : must be None: moments in which images weigh differently are not supported

    Raises
    ------
    InputError : an argument is missing, or weights are given; at a forward pass: a batch of another size
    """

    def __init__(
        self,
        module: nn.Module,
        per_class_bn: bool = False,
        ipc: int | None = None,
        start: int | None = None,
        end: int | None = None,
        weights: Tensor | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        if weights is not None:
            raise InputError("weights of single images are not supported; leave them out, or keep the script's own hook")
        if per_class_bn:
            if ipc is None or start is None or end is None:
                raise InputError(f"per_class_bn needs ipc, start and end, got {ipc}, {start} and {end}")
            check_table(module, ("running_mean_per_class", "running_var_per_class"), start, end)
        self.per_class_bn, self.ipc, self.start, self.end = per_class_bn, ipc, start, end
        super().__init__(module, process_group=process_group, backend=backend)

    def targets(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        if not self.per_class_bn:
            return super().targets(module)
        rows = slice(self.start, self.end)
        return module.running_mean_per_class[rows], module.running_var_per_class[rows]

    def groups(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self.per_class_bn:
            return None, None
        count = self.end - self.start
        if len(x) != count * self.ipc:
            raise InputError(f"{count} classes of {self.ipc} images make {count * self.ipc}, and the batch has {len(x)}")
        classes = torch.arange(count, device=x.device)
        return torch.arange(count + 1, device=x.device) * self.ipc, classes

    def runs_plainly(self, kind: type[nn.Module]) -> bool:
        return super().runs_plainly(kind) or kind.__name__ == "BatchNorm2dWithPerClassStats"


class BNFeatureHook(BNFeatureHook_new):
    """The older one, of one image a class."""

    def __init__(self, module: nn.Module, per_class_bn: bool = False, start=None, end=None, weights=None, **options):
        super().__init__(module, per_class_bn, 1, start, end, weights, **options)
