"""What drop-in hooks do on several ranks, for test_compat_ranks.py to look at: 1, 2 and 4 over gloo, forked from one process.

    python tests/compat_ranks.py FOLDER

leaves FOLDER/<size>_<rank>.pt of each rank.
"""

import copy
import multiprocessing
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfuse import freeze
from bnfuse.compat import BNFeatureHook, DeepInversionHook, gvbsm, wmdd

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from eager_hooks import BNFeatureHook as EagerHook  # noqa: E402

SHARES = {1: [7], 2: [5, 2], 4: [3, 1, 0, 3]}  # images of each rank
STEPS = 3


def layer(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    module, generator = kind(5).double(), torch.Generator().manual_seed(0)
    module.running_mean.copy_(torch.rand(5, generator=generator) + 3)
    module.running_var.copy_(torch.rand(5, generator=generator) + 0.2)
    module.running_mean_per_class = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    module.running_var_per_class = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    return freeze(module)


def images(step: int) -> torch.Tensor:
    """float64 [7, 5, 6, 9], far from 0 against their spread."""
    return torch.randn(7, 5, 6, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 3


def convolution_hook(conv: nn.Module, group) -> gvbsm.ConvFeatureHook:
    hook = gvbsm.ConvFeatureHook(conv, name="conv", drop_rate=0.5, cells=4, process_group=group)
    generator = torch.Generator().manual_seed(3)
    sizes = {"dd_mean": 5, "dd_var": 5, "patch_mean": 6, "patch_var": 6}
    hook.running = {f"running_{name}": torch.rand(n, generator=generator, dtype=torch.float64) for name, n in sizes.items()}
    return hook


HOOKS = {
    "plain": lambda module, group: BNFeatureHook(module, process_group=group),
    "fast_datafree": lambda module, group: DeepInversionHook(module, 0.9, process_group=group),
    "gvbsm": lambda module, group: gvbsm.BNFeatureHook(module, 0.4, process_group=group),
    "convolution": convolution_hook,
}


def measured(kind: str, group, rows: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """r_feature of each step, and its gradient by these rows."""
    random.seed(1)
    module = freeze(nn.Conv2d(5, 2, 3).double()) if kind == "convolution" else layer()
    hook, found = HOOKS[kind](module, group), []
    for step in range(STEPS):
        leaf = images(step)[rows].requires_grad_()
        module(leaf)
        r = hook.r_feature
        gradient = torch.autograd.grad(r, leaf)[0] if r.requires_grad else torch.zeros_like(leaf)
        found.append((r.detach(), gradient))
        if kind == "fast_datafree":
            hook.update_mmt()
    return found


def classes(group, ipc: int) -> torch.Tensor:
    """WMDD's distance of three classes of which this rank has `ipc` images each: those from its rank times ipc on."""
    module = layer()
    hook = wmdd.BNFeatureHook_new(module, True, ipc, 0, 3, process_group=group)
    x = torch.randn(3, 4, 5, 6, 9, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    first = 0 if group is None else dist.get_rank() * ipc
    module(x[:, first : first + ipc].flatten(0, 1))
    return hook.r_feature


class GeneratorAndTeacher(nn.Module):
    """What is trained, and a hooked network behind it, as DistributedDataParallel has them in data-free distillation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.teacher = nn.Conv2d(5, 5, 1).double(), layer()

    def forward(self, noise):
        return self.teacher(self.generator(noise))


def generator_gradient(hook_class, rows: slice, wrap, **options) -> torch.Tensor:
    model = GeneratorAndTeacher()
    hook, wrapped = hook_class(model.teacher, **options), wrap(model)
    out = wrapped(images(0)[rows])
    (hook.r_feature * options.get("process_group").size() if options else hook.r_feature + out.square().mean()).backward()
    return model.generator.weight.grad


def results(rank: int, size: int) -> dict:
    shares = SHARES[size]
    rows = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    world = dist.group.WORLD
    found = {kind: measured(kind, world, rows) for kind in HOOKS}
    if size < 4:
        found["classes"] = classes(world, 4 // size)
        found["ddp"] = [generator_gradient(hook, rows, DistributedDataParallel) for hook in (BNFeatureHook, EagerHook)]
        found["ddp, whole"] = generator_gradient(BNFeatureHook, rows, DistributedDataParallel, process_group=world)
        network = nn.Sequential(nn.Conv2d(5, 5, 1).double(), layer())
        hook = BNFeatureHook(network[1], process_group=world)
        network(images(0)[rows])
        copy.deepcopy(network)
        found["copied"] = hook.r_feature.detach()
    return found


def run(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{size}", rank=rank, world_size=size)
    torch.save(results(rank, size), folder / f"{size}_{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> int:
    fork = multiprocessing.get_context("fork")
    for size in SHARES:
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
