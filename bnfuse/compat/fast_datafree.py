"""The hook of Fast-Datafree and CMI: a moving average of the batches' moments, moved on when the script says so."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from .batchnorm import BatchNormHook


class DeepInversionHook(BatchNormHook):
    """`BatchNormHook` on ``(1 − m)·batch + m·average`` in place of the batch's moments; the gradient is the value's own.

    Parameters
    ----------
    module, process_group, backend : see `BatchNormHook`
    mmt_rate : m, from 0 up to 1; there is no average until `update_mmt` is called for the first time

    Attributes
    ----------
    mmt : the average, (mean, var) [1, C], or None
    tmp_val : the last batch's moments, the same
    """

    def __init__(
        self, module: nn.Module, mmt_rate: float = 0.0, *, process_group: dist.ProcessGroup | None = None, backend: str = "auto"
    ):
        if not 0 <= mmt_rate <= 1:
            raise InputError(f"mmt_rate must be from 0 to 1, got {mmt_rate}")
        self.mmt_rate, self.mmt = mmt_rate, None
        super().__init__(module, process_group=process_group, backend=backend)

    @property
    def measured_by_operator(self) -> bool:
        return self.mmt is None

    @property
    def tmp_val(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.var

    def update_mmt(self) -> None:
        """Takes the last batch's moments into the average."""
        batch = self.mean.detach(), self.var.detach()
        self.mmt = batch if self.mmt is None else self._averaged(*batch)

    def measure(self, mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor) -> Tensor:
        averaged = (mean, var) if self.mmt is None else self._averaged(mean, var)
        return super().measure(*averaged, target_mean, target_var)

    def _averaged(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.mmt_rate * old + (1 - self.mmt_rate) * new for old, new in zip(self.mmt, batch))
