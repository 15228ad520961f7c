"""One site at planes of 1×1 to 56×56, few channels and many, with a residual and without, all of the same size: none should be
slower than another.

    python benchmarks/small_planes.py [--threads 2]  # prints a table, and leaves results/small_planes.json
    python benchmarks/small_planes.py --quick        # a part of it, in seconds, into results/quick_small_planes.json

Speeds are shares of the bandwidth of a plain copy in the same rounds; report.py puts the slowest into README. Networks' own
sites, and rivals, are test_operators.py's.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import NamedTuple

import torch
from contenders import make_case, verify
from report import markdown
from results_file import write_result
from sites import LAYOUTS, Site
from timing import OURS, Contender, Machine, bandwidth

CPU = torch.device("cpu")
DIRECTIONS = ("forward", "backward")
VERIFIED_ELEMENTS = 2**17  # of a batch of the same planes, checked before any are timed


class Extent(NamedTuple):
    """How much is timed."""

    planes: tuple[int, ...]  # side by side
    channels: tuple[int, ...]
    elements: int  # of every site, about
    passes: int  # over all sites, so that a bad spell of the machine is not one site's
    rounds: int  # of a pass, at each site


FULL = Extent((1, 2, 4, 7, 8, 14, 28, 56), (3, 8, 16, 512), 2**23, 3, 7)
QUICK = Extent((1, 7, 56), (3, 64), 2**18, 1, 3)


def shares_of_bandwidth(
    plane: int, channels: int, residual: bool, layout: str, extent: Extent, machine: Machine
) -> list[dict[str, float]]:
    """Of each round of a pass, by direction: bytes that must be moved, over time, over the copy's bandwidth."""

    def case_of(elements: int):
        samples = max(2, round(elements / (channels * plane * plane)))
        return make_case(Site((samples, channels, plane, plane), "relu", residual), CPU, torch.float32, LAYOUTS[layout])

    checked, case = case_of(VERIFIED_ELEMENTS), case_of(extent.elements)
    ours = lambda case: {OURS: case.functions(compiled=False)[OURS]}
    verify(checked, ours(checked))
    contenders = {direction: case.contenders(ours(case), direction)[OURS] for direction in DIRECTIONS}
    contenders["copy"] = Contender(lambda _: machine.copy())

    def seconds(contender: Contender) -> float:
        given = contender.prepare()
        machine.flush()
        start = machine.clock()
        result = contender.run(given)
        taken = machine.clock() - start
        del result  # freed untimed
        return taken

    rounds = [{name: seconds(contender) for name, contender in contenders.items()} for _ in range(1 + extent.rounds)]
    moved = {d: case.site.passes(d) * case.x.numel() * case.x.element_size() for d in DIRECTIONS}
    return [{d: moved[d] / times[d] / bandwidth(times["copy"]) for d in DIRECTIONS} for times in rounds[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch's pool (default 2)")
    parser.add_argument("--quick", action="store_true", help="few planes, small tensors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    extent, machine = QUICK if arguments.quick else FULL, Machine(CPU)
    kinds = [(channels, False) for channels in extent.channels] + [(extent.channels[-1], True)]
    sites = [
        {"plane": side, "channels": channels, "residual": residual, "layout": layout}
        for layout in LAYOUTS
        for channels, residual in kinds
        for side in extent.planes
    ]
    rounds: list[list[dict[str, float]]] = [[] for _ in sites]
    for _ in range(extent.passes):
        for of_site, site in zip(rounds, sites):
            of_site += shares_of_bandwidth(**site, extent=extent, machine=machine)
    shares = [site | {d: median(round[d] for round in of_site) for d in DIRECTIONS} for site, of_site in zip(sites, rounds)]
    rows = [["of copy bandwidth", "channels", *(f"{side}×{side}" for side in extent.planes)]]
    for direction in DIRECTIONS:
        for layout in LAYOUTS:
            for kind in kinds:
                found = [s[direction] for s in shares if (s["layout"], (s["channels"], s["residual"])) == (layout, kind)]
                name = f"{kind[0]}, residual" if kind[1] else str(kind[0])
                rows.append([f"{direction}, {layout}", name, *(f"{share:.0%}" for share in found)])
    path = write_result(
        "quick_small_planes" if arguments.quick else "small_planes",
        "python benchmarks/small_planes.py" + (" --quick" if arguments.quick else ""),
        elements=extent.elements,
        rounds=extent.passes * extent.rounds,
        share_of_copy_bandwidth=shares,
    )
    print(f"{markdown(rows)}\n\nwrote {path}")


if __name__ == "__main__":
    main()
