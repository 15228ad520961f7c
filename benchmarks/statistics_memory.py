"""Peak memory of class statistics at ImageNet's scale: 1,000 classes and the 26,560 channels of a ResNet-50.

    python benchmarks/statistics_memory.py [--quick]

Each figure is of a process of its own: what its resident memory (pages of files included) rose to above what it was with
everything imported. Figures go to benchmarks/results/statistics_memory.json; `--quick` takes 100 classes and writes nothing.
Linux alone tells the peak.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from results_file import write_result

from bnfuse import ClassStatistics, Matcher
from bnfuse.site_moments import SiteMoments
from bnfuse.targets import Targets

# the channels of ResNet-50's 53 BatchNorm layers
STAGES = [(64, 3), (128, 4), (256, 6), (512, 3)]
CHANNELS = [64] + [
    c for width, blocks in STAGES for b in range(blocks) for c in [width, width, 4 * width] + [4 * width] * (not b)
]


def write(path: Path, classes: int) -> None:
    """Statistics of the right shapes, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    count = torch.full((classes,), 1300)
    sites = {}
    for s, channels in enumerate(CHANNELS):
        mean, m2 = torch.randn(2, classes, channels, generator=generator, dtype=torch.float64)
        sites[f"bn{s}"] = SiteMoments(count.clone(), mean, m2.square_())
    ClassStatistics(sites, count, "random", class_names=[str(k) for k in range(classes)]).save(path)


def everything_at_once(path: Path) -> None:
    """What it took before: all moments in float64, side by side, then the table."""
    mean, var = ClassStatistics.load(path).moments()
    Matcher(["all"], [mean.shape[1]], mean, var)


def whole_run(path: Path) -> None:
    statistics = ClassStatistics.load(path)
    Targets.class_wise(statistics, range(statistics.num_classes), at_once=1)


def unit_by_unit(path: Path) -> None:
    statistics = ClassStatistics.load(path)
    targets = Targets.class_wise(statistics, range(statistics.num_classes), at_once=1, budget=0)
    for k in range(statistics.num_classes):
        targets.rows([k])


def identity(path: Path) -> None:
    ClassStatistics.load(path).digest()


def recording(path: Path) -> None:
    """A batch of 16 images of 14×14 positions at each site, merged into empty tables of every class."""
    classes = ClassStatistics.load(path).num_classes
    tables = [SiteMoments.empty(classes, channels) for channels in CHANNELS]
    for table in tables:
        table.add_batch(torch.randn(16, table.mean.shape[1], 14, 14), torch.arange(16))


WORK = {
    "all moments in float64, then the table": everything_at_once,
    "targets of the whole run, float32": whole_run,
    "targets unit by unit, every class once": unit_by_unit,
    "digest of the file": identity,
    "recording one batch": recording,
}


def peak(name: str, path: Path) -> float:
    """MB that `WORK[name]` adds, in a process of its own."""
    command = [sys.executable, __file__, "--work", name, "--file", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(name: str, path: Path) -> float:
    def status(field: str) -> int:
        return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = status("VmRSS")
    WORK[name](path)
    return (status("VmHWM") - before) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 classes")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.work:
        print(json.dumps(_measure(args.work, args.file)))
        return
    classes = 100 if args.quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        write(path, classes)
        file_mb, peaks = path.stat().st_size / 1e6, {}
        print(f"{classes} classes × {sum(CHANNELS):,} channels, a file of {file_mb:.0f} MB; peak in MB")
        for name in WORK:
            peaks[name] = peak(name, path)
            print(f"  {name:40s} {peaks[name]:7.0f}", flush=True)
    if not args.quick:
        command = "python benchmarks/statistics_memory.py"
        print(f"wrote {write_result('statistics_memory', command, classes=classes, file_mb=file_mb, peak_mb=peaks)}")


if __name__ == "__main__":
    main()
