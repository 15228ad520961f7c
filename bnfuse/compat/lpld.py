"""LPLD's hooks: one class a batch, measured against that class's statistics, which lie on the layer."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from .batchnorm import BatchNormHook
from .deepinversion import BNFeatureHook

__all__ = ["BNFeatureHook", "BNFeatureHook_ClassStats_Training"]


class BNFeatureHook_ClassStats_Training(BatchNormHook):  # noqa: N801
    """`BatchNormHook` against ``module.class_running_mean[class_id]`` and ``module.class_running_var[class_id]``.

    Parameters
    ----------
    module, process_group, backend : see `BatchNormHook`; the two buffers are [K, C]
    class_id : the class of every image

    Raises
    ------
    InputError : the layer has no such buffers, or no such class
    """

    def __init__(
        self, module: nn.Module, class_id: int, *, process_group: dist.ProcessGroup | None = None, backend: str = "auto"
    ):
        check_table(module, ("class_running_mean", "class_running_var"), class_id, class_id + 1)
        self.class_id = class_id
        super().__init__(module, process_group=process_group, backend=backend)

    def targets(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        row = slice(self.class_id, self.class_id + 1)
        return module.class_running_mean[row], module.class_running_var[row]


def check_table(module: nn.Module, names: tuple[str, str], start: int, end: int) -> None:
    """InputError unless the layer has these buffers [K, C], and classes `start` to `end` among their rows."""
    for name in names:
        table = getattr(module, name, None)
        if table is None:
            raise InputError(
                f"this {type(module).__name__} has no {name} [K, C], the statistics of each class; record them first"
            )
        if not 0 <= start < end <= len(table):
            raise InputError(f"classes {start} to {end} were asked for, and {name} has {len(table)}")
