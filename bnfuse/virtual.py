"""Exact virtual batches: the gradient of a batch of any size in the memory of a micro-batch, on one rank or on several.

The frozen network looks at every image by itself; only the loss couples them, through the moments of the batch. So the
micro-batches are streamed twice: first for their moments, which are merged, and the loss of the merged ones; then forward and
backward, with the loss's derivatives fixed. Where micro-batch b holds n_b of a group's n samples, and m_b and v_b are its
moments of them (biased),

    mean = Σ n_b/n · m_b                var = Σ n_b/n · (v_b + (m_b − mean)²)
    ∂L/∂m_b = n_b/n · (∂L/∂mean + 2·∂L/∂var·(m_b − mean))           ∂L/∂v_b = n_b/n · ∂L/∂var

and the network's own backward from m_b and v_b gives each image what the big batch's would. The last micro-batch keeps its
graph and goes backward first, so that a batch of one micro-batch is seen once. Over the ranks of a team the merge is one
all-reduce for the whole network. Nothing here knows what the loss is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import ALONE, Team
from .errors import InputError
from .moments import Moments
from .site_moments import SiteMoments, from_power_sums, power_sums

Means = dict[str, Tensor]  # term → its mean over some images, a scalar


@dataclass(frozen=True)
class MicroBatch:
    """Images that go through the network together.

    Attributes
    ----------
    rows : which of this rank's images
    groups : which of the batch's G groups have a sample among them, and the empty groups between: g of them
    group_starts : int64 [g + 1], where those begin among the rows
    samples : int64 [g], how many of each there are
    share : float64 [g, 1], of the group's samples in the whole batch
    weight : share of the whole batch's images
    """

    rows: slice
    groups: slice
    group_starts: Tensor
    samples: Tensor
    share: Tensor
    weight: float


@dataclass(frozen=True)
class Seen:
    """A micro-batch after its forward pass.

    Attributes
    ----------
    images : [n, C, H, W], the leaf by which is differentiated
    means : terms that each image has of its own (cross-entropy, image priors): their means over these images
    moments : of every site, [g, C] each
    """

    images: Tensor
    means: Means
    moments: Moments


class VirtualBatch:
    """A batch cut into micro-batches, and the gradient of the whole of it.

    Parameters
    ----------
    group_starts : int64 [G + 1], of the whole batch, also on the ranks of a team
    micro_batch : images at a time; None, all of the rank's
    team : the ranks that share the batch
    centre : names and channels of sites → [T], a value near the mean of each of their channels, side by side, the same on
        every rank; the network's running means do, see `FusedModel.running_means`. A team alone asks for it: it sums the
        powers of what is left over it, for which 0 would do where no mean is far from 0 against its standard deviation

    Attributes
    ----------
    count : images of the whole batch
    rows : which of them are this rank's. A rank that has none keeps the first one at weight 0, so that it goes through the
        same motions as the others
    parts : the rank's micro-batches

    Raises
    ------
    InputError : an empty batch, a micro_batch that is not positive
    """

    def __init__(
        self,
        group_starts: Tensor,
        micro_batch: int | None = None,
        team: Team = ALONE,
        centre: Callable[[Iterable[str], Iterable[int]], Tensor] | None = None,
    ):
        starts = group_starts.tolist()
        self.team, self.centre, self.count = team, centre, starts[-1]
        check_micro_batch(micro_batch)
        if self.count < 1:
            raise InputError("a batch needs at least one image, got none")
        self.group_starts, self.samples = group_starts, group_starts.diff()  # [G + 1], [G]
        own = team.rows(self.count)
        self.owned = own.stop - own.start
        self.rows = own if self.owned else slice(0, 1)
        step = micro_batch or self.count
        self.parts = [
            self._part(starts, first, min(first + step, self.rows.stop))
            for first in range(self.rows.start, self.rows.stop, step)
        ]

    def _part(self, starts: list[int], first: int, stop: int) -> MicroBatch:
        groups = slice(bisect_right(starts, first) - 1, bisect_left(starts, stop))
        cut = [min(max(start, first), stop) - first for start in starts[groups.start : groups.stop + 1]]
        group_starts = torch.tensor(cut, device=self.samples.device)
        samples = group_starts.diff() * (self.owned > 0)
        share = samples.double() / self.samples[groups].clamp(min=1)
        rows = slice(first - self.rows.start, stop - self.rows.start)
        weight = (stop - first) / self.count if self.owned else 0.0
        return MicroBatch(rows, groups, group_starts, samples, share[:, None], weight)

    @property
    def is_plain(self) -> bool:
        """Whether it is one micro-batch on one rank: then plain autograd does."""
        return self.team.size == 1 and len(self.parts) == 1

    def gradients(
        self, look: Callable[[MicroBatch], Seen], loss: Callable[[Means, Moments], tuple]
    ) -> tuple[tuple, Iterator[tuple[slice, Tensor]]]:
        """The loss of the whole batch and, one micro-batch at a time, its gradient by the images.

        Parameters
        ----------
        look : the forward pass of a micro-batch. It is called twice for each but the last, and must do the same both times: a
            random view is drawn before, and replayed
        loss : (means, moments) of the whole batch → a scalar and anything else; any function that is differentiable in
            both: distances, moving averages, mixtures. The moments are [G, C] each, an empty group's are 0

        Returns
        -------
        losses : what `loss` returned
        gradients : yields (rows, gradient [n, C, H, W]) for each micro-batch, the last first. The images of those rows may be
            updated at once, before the next is asked for: no gradient depends on other rows' images any more
        """
        pooled = None
        for part in self.parts:
            with torch.set_grad_enabled(part is self.parts[-1]):
                seen = look(part)
            pooled = pooled or _Pool(len(self.samples), seen)
            pooled.add(part, seen)
        pooled.finish(self)
        losses = loss(pooled.means, pooled.moments)
        pooled.differentiate(losses[0])
        return losses, self._second_stream(look, seen, pooled)

    def _second_stream(self, look, seen: Seen | None, pooled: _Pool) -> Iterator[tuple[slice, Tensor]]:
        for part in reversed(self.parts):
            gradient = pooled.gradient(part, seen or look(part))
            seen = None
            yield part.rows, gradient


class _Pool:
    """Means and moments over micro-batches and ranks, gathered in float64, and the loss's derivatives by them.

    The moments of all sites lie side by side in tables [G, T]; their counts are samples, of which every site has as many.
    """

    def __init__(self, groups: int, like: Seen):
        values = [mean for mean, _ in like.moments.values()]
        self.sites, self.channels = list(like.moments), [value.shape[1] for value in values]
        self.positions = like.moments.positions
        self.terms = {name: value.dtype for name, value in like.means.items()}
        self.dtype, table = values[0].dtype, values[0].new_zeros(groups, sum(self.channels), dtype=torch.float64)
        self.table = SiteMoments(table.new_zeros(groups, dtype=torch.int64), table, table.clone())
        self.sums = table.new_zeros(len(self.terms))

    def add(self, part: MicroBatch, seen: Seen) -> None:
        """Merges a micro-batch (Chan, Golub, LeVeque 1979)."""
        mean, var = (side_by_side(values) for values in zip(*seen.moments.values()))  # [g, T]
        whole, g = self.table, part.groups
        new = SiteMoments(part.samples, mean, var * part.samples[:, None])
        merged = SiteMoments(whole.count[g], whole.mean[g], whole.m2[g]).merge(new)
        whole.count[g], whole.mean[g], whole.m2[g] = merged.count, merged.mean, merged.m2
        if self.terms:
            self.sums += part.weight * torch.stack([value.detach().double() for value in seen.means.values()])

    def finish(self, batch: VirtualBatch) -> None:
        """From this rank's sums to the whole batch's `means` and `moments`, leaves of the loss."""
        counts = batch.samples.clamp(min=1)[:, None]  # [G, 1]
        if batch.team.size > 1:
            self._reduce(batch, counts)
        self.mean = self.table.mean  # [G, T]
        leaves = [self.mean, self.table.m2 / counts]
        self.leaves = [value.to(self.dtype).requires_grad_() for value in leaves]
        self.means = {
            name: value.to(dtype).requires_grad_() for (name, dtype), value in zip(self.terms.items(), self.sums.unbind())
        }
        parts = zip(*(leaf.split(self.channels, dim=1) for leaf in self.leaves))
        self.moments = Moments(zip(self.sites, parts), self.positions, batch.group_starts)

    def _reduce(self, batch: VirtualBatch, counts: Tensor) -> None:
        """One all-reduce: the power sums of every channel, where no rank knows the others' means but all know the centre."""
        table = self.table
        centre = table.mean.new_zeros(1) if batch.centre is None else batch.centre(self.sites, self.channels).double()  # [T]
        centre = torch.where(batch.samples[:, None] > 0, centre, 0.0)  # [G, T], an empty group's mean is 0
        first, second = power_sums(table.count[:, None], table.mean, table.m2, centre)
        sums = batch.team.sum_(torch.cat([first.flatten(), second.flatten(), self.sums]))
        first, second = (part.view_as(table.mean) for part in sums[: 2 * first.numel()].chunk(2))
        table.mean, table.m2 = from_power_sums(counts, first, second, centre)
        self.sums = sums[len(sums) - len(self.sums) :]

    def differentiate(self, loss: Tensor) -> None:
        leaves = [*self.leaves, *self.means.values()]
        by_mean, by_var, *by_means = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        self.by_mean, self.by_var, self.by_means = by_mean.double(), by_var.double(), by_means  # [G, T] each, scalars

    def gradient(self, part: MicroBatch, seen: Seen) -> Tensor:
        """∂loss/∂images of one micro-batch, [n, C, H, W]."""
        means, variances = zip(*seen.moments.values())
        g = part.groups
        by_var = part.share * self.by_var[g]  # [g, T]
        by_mean = part.share * self.by_mean[g] + 2 * by_var * (side_by_side(means) - self.mean[g])
        outputs, weights = [*seen.means.values()], [part.weight * value for value in self.by_means]
        for values, derivatives in ((means, by_mean), (variances, by_var)):
            outputs += values
            weights += [piece.contiguous() for piece in derivatives.to(self.dtype).split(self.channels, dim=1)]
        return torch.autograd.grad(outputs, seen.images, weights)[0]


def check_micro_batch(micro_batch: int | None) -> None:
    """InputError unless it is None or a number of images."""
    if micro_batch is not None and micro_batch < 1:
        raise InputError(f"micro_batch must be at least 1, got {micro_batch}; leave it out to have the whole batch at once")


def side_by_side(values: Iterable[Tensor]) -> Tensor:
    """[g, C] of each site → float64 [g, T], without gradient."""
    return torch.cat([value.detach() for value in values], dim=1).double()
