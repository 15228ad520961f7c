"""The processes of one run under torchrun: who they are, what the first tells the others, and the teams that share a batch.

    torchrun --nproc-per-node 8 -m bnfuse synthesize …                        # every rank works on units of its own
    torchrun --nproc-per-node 8 -m bnfuse synthesize --ranks-per-batch 4 …    # two teams, each shares every batch among four

Ranks talk when a run begins and when it ends; in between only those of one team do. Without torchrun there is one rank.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import BnfuseError, InputError
from .signals import Stop

Result = TypeVar("Result")

# By then every rank has loaded teacher and statistics.
_START_TIMEOUT = timedelta(minutes=30)
# Ranks wait for each other at the end of a run, and one may have hours more to do than another. torchrun ends the rest when
# one dies, so a timeout need not.
_TIMEOUT = timedelta(days=7)
_PR_SET_PDEATHSIG = 1


class OtherRankFailed(BnfuseError):
    """This rank ends because another one did, which has told the user why."""


def rank() -> int:
    """This process's number in torchrun's environment; 0 without torchrun."""
    return _number("RANK", 0) if is_distributed() else 0


def is_distributed() -> bool:
    return _number("WORLD_SIZE", 1) > 1


def choose_device(asked: str | torch.device | None = None) -> torch.device:
    """The device of this rank: CUDA number LOCAL_RANK where there is one and nothing else was asked for.

    Raises
    ------
    InputError : there are fewer GPUs than ranks on this host
    """
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" or not is_distributed() or not torch.cuda.is_available():
        return device
    if device.index is None:
        number, there = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        if number >= there:
            raise InputError(
                f"rank {rank()} is number {number} on its host, which has {there} GPUs: start torchrun with --nproc-per-node "
                f"{there}, or, where every rank sees only a GPU of its own, give --device cuda:0"
            )
        device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


# ---- the ranks that share a batch ----


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


# ---- the ranks of a run ----


@dataclass
class Ranks:
    """The processes of a run, as one of them sees them. Made by `start`; a `with` block ends what was started.

    Attributes
    ----------
    rank, world : this process's number, and how many there are
    team : the ranks that share this one's batches
    team_number, teams : which of the teams that is, and how many there are
    """

    rank: int = 0
    world: int = 1
    team: Team = ALONE
    team_number: int = 0
    teams: int = 1
    _started: bool = False  # the process group is ours to end

    @classmethod
    def start(cls, ranks_per_batch: int = 1) -> Ranks:
        """Reads torchrun's environment and joins the process group: gloo for the CPU, beside it NCCL for GPUs.

        Parameters
        ----------
        ranks_per_batch : ranks of a team; teams are ranks that follow each other, so of one host as far as possible

        Raises
        ------
        InputError : the ranks cannot be divided into such teams, or the environment is not whole
        """
        world = _number("WORLD_SIZE", 1)
        if ranks_per_batch < 1 or world % ranks_per_batch:
            raise InputError(
                f"{world} ranks cannot be divided into teams of {ranks_per_batch}: choose a number of ranks "
                "(torchrun --nproc-per-node, --nnodes) that is a multiple of --ranks-per-batch"
            )
        if world == 1:
            return cls()
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise InputError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start the ranks with torchrun")
        _end_with_launcher()
        started = not dist.is_initialized()
        if started:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            store, number, _ = next(dist.rendezvous("env://", timeout=_START_TIMEOUT))
            if _number("GROUP_WORLD_SIZE", 1) == 1:
                # torchrun on one host may keep its store when it starts the ranks again: they must not find the addresses of
                # their predecessors. On several hosts it makes a new one, and counts restarts on each by itself.
                store = dist.PrefixStore(f"attempt {_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=_TIMEOUT)
        elif "cpu:gloo" not in str(dist.get_backend_config()):
            raise InputError(
                f"the process group that is there already, {dist.get_backend_config()}, cannot send what lies on the CPU: make "
                "it by init_process_group('cpu:gloo,cuda:nccl'), or leave it to bnfuse"
            )
        number = dist.get_rank() // ranks_per_batch
        team = ALONE
        if ranks_per_batch > 1:
            for first in range(0, world, ranks_per_batch):  # every rank has to take part in making every group
                group = dist.new_group(list(range(first, first + ranks_per_batch)), timeout=_TIMEOUT)
                if first == number * ranks_per_batch:
                    team = Team(rank=dist.get_rank() % ranks_per_batch, size=ranks_per_batch, group=group)
        return cls(dist.get_rank(), world, team, number, world // ranks_per_batch, started)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._started and kind is None:  # after an error others may not answer any more
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this rank commits what its team makes."""
        return self.team.rank == 0

    def from_first(self, work: Callable[[], Result], stop: Stop | None = None) -> Result:
        """Does `work` on the first rank alone, and returns there and on all others what came of it.

        The result consists of JSON's types. Where the work fails, every rank raises: the first what was raised, the others
        `OtherRankFailed`.
        """
        if self.world == 1:
            return work()
        content, error = b"", None
        if self.first:
            try:
                content = json.dumps(work()).encode()
            except BaseException as raised:
                error = raised
        size = torch.tensor([-1 if error is not None else len(content)])
        self._wait_for(dist.broadcast(size, 0, async_op=True), stop)
        if error is not None:
            raise error
        if size < 0:
            raise OtherRankFailed("rank 0 could not begin")
        buffer = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.first else torch.empty(int(size), dtype=torch.uint8)
        )
        self._wait_for(dist.broadcast(buffer, 0, async_op=True), stop)
        return json.loads(buffer.numpy().tobytes())

    def wait(self, stop: Stop | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Returns when every rank has come here; until then calls `meanwhile` again and again."""
        if self.world > 1:
            self._wait_for(dist.all_reduce(torch.zeros(1), async_op=True), stop, meanwhile)

    def _wait_for(self, work: dist.Work, stop: Stop | None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Waits in small steps, since Python sees no signal while it is inside a collective operation."""
        with noticing_lost_ranks():
            while not work.is_completed():
                if stop is not None:
                    stop.check()
                meanwhile()
                time.sleep(0.02)
            work.wait()


@contextmanager
def noticing_lost_ranks() -> Iterator[None]:
    """Turns the error of a collective operation whose other ranks are gone into `OtherRankFailed`."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
            raise
        raise OtherRankFailed(f"another rank has ended before the run did ({str(error).splitlines()[0]})") from error


def any_of(team: Team, flag: bool) -> bool:
    """Whether the flag is set on any rank of the team: the same answer on all of them."""
    if team.size == 1:
        return flag
    flags = torch.tensor([float(flag)])  # on the CPU: the device need not be waited for
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=team.group)
    return bool(flags)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise InputError(f"the environment variable {name} is {value!r}, expected a number as torchrun sets it")
    return default if value is None else int(value)


def _end_with_launcher() -> None:
    """If torchrun is killed, its ranks get a SIGTERM: otherwise they would keep the dataset locked. Linux alone can do it.

    Raises InputError where torchrun has gone already.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens there
        address = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            raise InputError(f"torchrun does not answer at {address[0]}:{address[1]}, so this rank ends: {error}") from error
