"""What differs when several processes work together, on torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """The ranks that share one batch, each some of its rows; ``Team()`` is one process alone, which talks to nobody.

    Attributes
    ----------
    rank, size : which of how many
    group : None, all ranks there are
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def rows(self, count: int) -> slice:
        """This rank's contiguous share of `count` rows: as many as the others', or one more, or (count < size) none."""
        return self._rows_of(self.rank, count)

    def _rows_of(self, rank: int, count: int) -> slice:
        each, over = divmod(count, self.size)
        start = rank * each + min(rank, over)
        return slice(start, start + each + (rank < over))

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, in place; all get the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """Every rank's rows in order, [count, ...] on every rank, from `rows` [this rank's share of count, ...]."""
        if self.size == 1:
            return rows
        longest = rows.new_zeros(-(-count // self.size), *rows.shape[1:])  # a collective wants equal shapes
        longest[: len(rows)] = rows
        shares = [torch.empty_like(longest) for _ in range(self.size)]
        dist.all_gather(shares, longest, group=self.group)
        spans = (self._rows_of(rank, count) for rank in range(self.size))
        return torch.cat([share[: span.stop - span.start] for share, span in zip(shares, spans)])


ALONE = Team()
