"""A moving average of a batch's moments from step to step: what small batches match in place of their own moments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError

GRADIENTS = ("scaled", "straight_through")
STARTS = ("zero", "first")


class MovingAverage(nn.Module):
    """``average ← momentum·average + (1 − momentum)·batch``, of the means and the variances alike.

    Parameters
    ----------
    momentum : from 0 up to 1; 0 is the batch itself
    gradient : "scaled", that of the value, 1 − momentum of the batch's (Fast-Datafree, CMI); or "straight_through", the
        batch's at full weight, with the value of the average (G-VBSM, EDC)
    start : "zero", the average begins at 0, so that the first values are small (G-VBSM, EDC); or "first", the first batch is
        the average, with its own gradient (Fast-Datafree)

    Attributes
    ----------
    mean, var : [G, T], the average so far, in the state dict; [0, 0] before the first batch
    begun : bool scalar, whether there has been a batch

    Raises
    ------
    InputError : an argument out of its range
    """

    def __init__(self, momentum: float, gradient: str = "scaled", start: str = "zero"):
        super().__init__()
        if not 0 <= momentum < 1:
            raise InputError(f"the momentum of a moving average must be from 0 up to but not 1, got {momentum}")
        for name, value, allowed in (("gradient", gradient, GRADIENTS), ("start", start, STARTS)):
            if value not in allowed:
                raise InputError(f"{name} of a moving average must be one of {', '.join(allowed)}, got {value!r}")
        self.momentum, self.gradient, self.start = momentum, gradient, start
        self.register_buffer("mean", torch.zeros(0, 0))
        self.register_buffer("var", torch.zeros(0, 0))
        self.register_buffer("begun", torch.tensor(False))

    def forward(self, mean: Tensor, var: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor]:
        """The averages with this batch in them, to be matched in place of the batch's moments.

        Parameters
        ----------
        mean, var : [G, T] of the batch, float32 or float64; G groups, which must stay the same groups until `reset`
        update : whether the averages that are kept take the batch in, without its gradient

        Returns
        -------
        mean, var : [G, T]

        Raises
        ------
        InputError : another shape than before
        """
        if update or self.mean.numel():
            self._fit(mean)
            kept = self.mean, self.var
        else:  # one that has not begun, and is only looked at
            kept = torch.zeros_like(mean), torch.zeros_like(var)
        share = 1 - self.momentum
        if self.start == "first":
            share = 1 - self.momentum * self.begun.to(mean.dtype)  # on the device: nothing waits for it
        values = [share * batch + (1 - share) * old for batch, old in zip((mean, var), kept)]
        if update:
            with torch.no_grad():
                self.mean.copy_(values[0])
                self.var.copy_(values[1])
                self.begun.fill_(True)
        if self.gradient == "straight_through":
            values = [value.detach() + (batch - batch.detach()) for value, batch in zip(values, (mean, var))]
        return values[0], values[1]

    def reset(self) -> None:
        """Begins anew; the next batch may have other groups."""
        self.mean, self.var = self.mean.new_zeros(0, 0), self.var.new_zeros(0, 0)
        self.begun = torch.zeros_like(self.begun)

    def state(self) -> dict[str, Tensor]:
        """Copies of the buffers, for `restore`."""
        return {name: value.clone() for name, value in self.named_buffers()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state`: where there are buffers of its shape, in their memory, which a captured graph reads.

        That of an average that had not begun leaves zeros, of whatever shape there is.
        """
        for name, old in list(self.named_buffers()):
            new = state[name] if state[name].numel() else torch.zeros_like(old)
            if new.shape == old.shape and new.dtype == old.dtype:
                old.copy_(new)
            else:
                setattr(self, name, new.to(self.begun.device, copy=True))

    def _fit(self, mean: Tensor) -> None:
        if not self.mean.numel():
            with torch.inference_mode(False):  # or it could not be gone on with outside of that mode
                blank = torch.zeros(mean.shape, dtype=mean.dtype, device=mean.device)
                self.mean, self.var, self.begun = blank, blank.clone(), self.begun.to(mean.device)
        elif self.mean.shape != mean.shape or self.mean.dtype != mean.dtype:
            raise InputError(
                f"a moving average of {self.mean.dtype} moments {list(self.mean.shape)} was given {mean.dtype} "
                f"{list(mean.shape)}: groups and sites must stay the same; call reset() before another batch begins"
            )

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, gradient={self.gradient}, start={self.start}"

    def _load_from_state_dict(self, state, prefix, *arguments) -> None:
        for name in ("mean", "var"):
            if (saved := state.get(prefix + name)) is not None and saved.shape != getattr(self, name).shape:
                setattr(self, name, saved.new_zeros(saved.shape, device=self.begun.device))
        super()._load_from_state_dict(state, prefix, *arguments)
