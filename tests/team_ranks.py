"""What ranks compute together, for test_team.py to look at: teams of 1, 2 and 4 over gloo, forked from one process.

    python tests/team_ranks.py FOLDER

leaves FOLDER/<size>_<rank>.pt of each rank. Forked, for importing torch takes longer than all the rest; nothing may have been
differentiated before.
"""

import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import virtual_cases as cases

from bnfuse.distributed import Team
from bnfuse.ensemble import TEACHER_PLANS
from bnfuse.optimisation import NonFiniteLoss

SIZES = (1, 2, 4)
COUNTS = (11, 3)  # of 3 images a team of 4 has a rank without any
MICRO_BATCHES = (None, 2)


@dataclass(frozen=True)
class CountingTeam(Team):
    """Knows how many elements each of its all-reduces had."""

    sums: list[int] = field(default_factory=list)

    def sum_(self, tensor):
        self.sums.append(tensor.numel())
        return super().sum_(tensor)


def results(team: Team) -> dict:
    found = {"rows": [(s.start, s.stop) for s in map(team.rows, (0, 1, 3, 8, 11))]}
    mine = team.rows(11)
    found["gathered"] = team.gather_rows(torch.arange(22).view(11, 2)[mine], 11)
    found["sum"] = team.sum_(torch.tensor([1.0, float(team.rank)], dtype=torch.float64))

    fused = cases.network()
    for count in COUNTS:
        for micro_batch in MICRO_BATCHES:
            for name, loss in cases.LOSSES.items():
                total, gradient, _ = cases.virtual_batch(fused, loss, *cases.batch(count), micro_batch, team)
                found[f"{name}, {count}, {micro_batch}"] = total, gradient

    teacher = cases.teacher(3)
    objective = cases.objective(teacher, tv_weight=0.1, l2_weight=0.1)
    for micro_batch in MICRO_BATCHES:
        counting, keep = CountingTeam(team.rank, team.size), cases.Keep(10)
        images, losses = cases.make_unit(objective, teacher, micro_batch=micro_batch, team=counting, checkpoint=keep)
        resumed = cases.make_unit(objective, teacher, micro_batch=micro_batch, team=team, state=dict(keep.states[10]))
        found[f"unit, {micro_batch}"] = images, losses, keep.states[10], counting.sums
        found[f"resumed, {micro_batch}"] = resumed
    found["two teachers"] = [cases.make_unit(cases.ensemble(teacher, plan), teacher, team=team) for plan in TEACHER_PLANS]

    class OneWants(cases.Keep):
        def due(self, step):
            return team.rank == team.size - 1 and step == 10

    keep = OneWants()
    cases.make_unit(objective, teacher, team=team, checkpoint=keep)
    found["saved at"] = list(keep.states)

    outputs = torch.nn.functional.one_hot(cases.LABELS, 10).float()
    outputs[-1] = float("nan")  # of the last rank that has images
    try:
        cases.make_unit(objective, teacher, outputs=outputs, team=team)
    except NonFiniteLoss as error:
        found["not finite"] = error.step, error.where
    return found


def run(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{size}", rank=rank, world_size=size)
    torch.save(results(Team(rank, size)), folder / f"{size}_{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> int:
    fork = multiprocessing.get_context("fork")
    for size in SIZES:
        ranks = [fork.Process(target=run, args=(folder, rank, size)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
