"""The driver: one readable loop over units of work, from noise to images on disk.

`plans` says what there is to do, `units` makes a unit, `optimisation` is the method itself. A stopped run goes on where it
was, and ends with the same images. Under torchrun units are dealt to ranks, or to teams of ranks, which do not talk while they
work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .card import CARD, read_card
from .display import Display
from .distributed import Ranks, choose_device, noticing_lost_ranks
from .errors import InputError, Interrupted
from .manifest import is_store
from .models import Teacher
from .plans import SynthesisConfig
from .signals import Stop
from .snapshots import UnitCheckpoint
from .statistics import ClassStatistics
from .store import Store
from .units import UnitMaker, as_begun
from .writing import BackgroundWriter


@dataclass(frozen=True)
class SynthesisResult:
    """What a run did: the store's folder, images in all, images made now, seconds of it, and the last loss terms."""

    out: Path
    images: int
    made: int
    seconds: float
    losses: dict[str, float]


def synthesize(
    teacher: Teacher,
    statistics: ClassStatistics | None,
    out: str | Path,
    config: SynthesisConfig = SynthesisConfig(),
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    micro_batch: int | None = None,
    offload: bool = False,
    cuda_graph: bool = False,
    progress: bool = True,
    tensorboard: str | Path | None = None,
    ranks_per_batch: int = 1,
    checkpoint_every: int = 0,
    retries: int = 2,
    threads: int | None = None,
    more_teachers: Sequence[tuple[Teacher, ClassStatistics | None]] = (),
) -> SynthesisResult:
    """Makes a synthetic dataset from noise and stores it, one unit after the other.

    Called again with the same arguments after it was stopped, it continues; called when done, it returns at once. Called on
    every rank under torchrun, it deals the units to the ranks; the number of ranks may be another each time. On the CPU the
    images are the same, byte for byte, whatever the number of ranks and however often they were stopped.

    Parameters
    ----------
    teacher : the frozen network and its preprocessing
    statistics : recorded with that teacher; None only with ``config.targets == "running"``
    out : folder of the dataset, see `store`; all ranks must see it. Its contact_sheet.png is refreshed while the images form
    device : default CUDA where there is one, under torchrun the one of LOCAL_RANK
    backend : see `bnfuse.backends`
    micro_batch : images that are in the network together, as many as memory allows; None, the whole batch. It changes rounding
        alone: losses and gradients are those of ``config.batch_size`` images, see `virtual`. A dataset is continued with the
        number that it was begun with
    offload : images and the optimiser's state stay in the CPU's memory, and a micro-batch of them is on the device, so that the
        device's memory does not depend on the batch size at all
    cuda_graph : capture the network's part of a step, and replay it: less to do for Python, where the GPU is faster than it
    progress : show a bar, on the first rank, and say what the run will take
    tensorboard : folder for the course of the losses, see `scalars`
    ranks_per_batch : ranks that share each batch, again as it was begun; then the images are the same to rounding
    checkpoint_every : steps from one checkpoint of a unit to the next, 0 for none; when a SIGTERM or SIGINT comes one is
        written in any case
    retries : how often a unit whose loss is not finite is made again, each time from other seeds
    threads : with which the CPU computes, on each rank; they decide how sums are rounded, so a dataset is continued with the
        number that it was begun with (default that, or torch's number)
    more_teachers : others that look at the images as ``config.teacher_plan`` says, each with its statistics. They take the same
        images, know the same classes, and all have their memory at once where they look together

    Raises
    ------
    InputError : config, statistics and teacher do not fit, `out` holds another dataset, or the disk is too small for it
    Interrupted : a SIGTERM or SIGINT came; what was made is safe
    BnfuseError : a unit's loss was not finite, however it was begun
    """
    if checkpoint_every < 0:
        raise InputError(f"checkpoint_every must be at least 0, got {checkpoint_every}")
    out = Path(out).expanduser()
    ranks = Ranks.start(ranks_per_batch)
    device = choose_device(device)
    maker = UnitMaker(teacher, statistics, config, device, backend, micro_batch, offload, cuda_graph, more_teachers)
    names = maker.source.names
    counts = maker.counts
    started, losses = time.monotonic(), {}
    store: Store | None = None
    display: Display | None = None

    def begin() -> dict:
        nonlocal store
        before = read_card(out) if is_store(out) and (out / CARD).exists() else None
        card = maker.card(_threads(threads, device, before), ranks_per_batch)
        card = card if before is None else as_begun(card, before)
        store = Store.open(out, card=card, class_names=names, counts=counts)
        return {"threads": card["threads"], "done": sorted(store.done)}

    with Stop(quiet=not ranks.first) as stop, ranks:
        try:
            begun = ranks.from_first(begin, stop)
            done = set(begun["done"])
            todo = [unit for unit in maker.units if unit.number not in done]
            mine = todo[ranks.team_number :: ranks.teams]
            if ranks.first:
                display = Display(store, maker, ranks.teams, progress, tensorboard)
            elif ranks.writes and mine:
                store = Store.join(out, ranks.rank, begun["done"])
            writing = BackgroundWriter(store) if store else nullcontext()
            with writing as writer, computing_with(begun["threads"]), noticing_lost_ranks():
                for unit in mine:
                    show = partial(display.show, unit) if display else (lambda *_: None)
                    checkpoint = UnitCheckpoint(
                        out, unit.number, config.total_iterations, every=checkpoint_every, stop=stop, team=ranks.team
                    )
                    images, records = maker.make(unit, show, retries, team=ranks.team, checkpoint=checkpoint)
                    losses = records[0].losses
                    if ranks.writes:
                        writer.commit(unit.number, images, records, maker.soft_labels(images))
                    if display:
                        display.made(unit, images)
                    stop.check()
            if not ranks.first and store is not None:
                store.close()  # the first rank waits for this, to fold the shards in
            ranks.wait(stop, display.count if display else lambda: None)
            if ranks.first:
                store.finish()
                display.finish()
        except Interrupted as stopped:
            safe = f"{display.committed()} of {sum(counts)} images are safe in {out}" if display else ""
            kept = "; ".join(filter(None, (stopped.kept, safe, "the same command goes on")))
            raise Interrupted(stopped.signal, kept) from None
        finally:
            if display is not None:
                display.close()
            if store is not None:
                store.close()
    made = sum(len(unit.classes) for unit in todo)
    return SynthesisResult(out, sum(counts), made, time.monotonic() - started, losses)


def _threads(asked: int | None, device: torch.device, before: dict | None) -> int | None:
    """With how many threads a dataset is made that was begun as the card `before` says; None for GPUs, where none matter."""
    if asked is not None and asked < 1:
        raise InputError(f"threads must be at least 1, got {asked}")
    if device.type != "cpu":
        return None
    return asked or (before or {}).get("threads") or torch.get_num_threads()


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """torch computes with so many threads on the CPU; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
