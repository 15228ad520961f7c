"""Memory of a step while the batch grows and the micro-batch does not, and what the second stream costs.

    python benchmarks/virtual_batches.py             # into benchmarks/results, docs/virtual_batches.md and its picture
    python benchmarks/virtual_batches.py --quick     # a small part, printed; nothing is written
    python benchmarks/virtual_batches.py --report    # the page and the picture once more, from the results
    python benchmarks/virtual_batches.py --only time # memory, which takes most of the minutes, stays as it was measured before

Memory: each batch in a process of its own, its second step. The images and Adam's two moments of them, which any code that
optimises so many images has to hold, are counted apart from what the step needs to work. Time: a step in micro-batches and one
in one piece take turns; no step has to be more than a forward pass dearer.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import subprocess
import sys
import time
from pathlib import Path

import torch
from report import ROOT, circumstances, markdown, times, write_block
from results_file import RESULTS, measured_on, write_result
from step_memory import Peak, child_environment

PAGE, PICTURE = ROOT / "docs/virtual_batches.md", ROOT / "docs/images/virtual_batches.png"
NAME, COMMAND = "virtual_batches", "python benchmarks/virtual_batches.py"


# ---- memory ----


def measure_memory(batch: int, micro_batch: int | None) -> int:
    """Bytes that the second step takes at its peak, over what lived before it."""
    from units import Steps, Unit

    found = {}

    def see(step: int) -> None:
        if step == 1:
            found["peak"] = Peak(torch.device("cpu"))
        else:
            found["bytes"] = found["peak"].bytes()

    Unit(batch).run(Steps(2, see), micro_batch=micro_batch)
    return found["bytes"]


def memory_case(batch: int, micro_batch: int | None, threads: int) -> dict:
    command = [sys.executable, __file__, "--measure", str(batch), str(micro_batch or 0), "--threads", str(threads)]
    printed = subprocess.run(command, env=child_environment(), check=True, stdout=subprocess.PIPE, text=True).stdout
    case = {
        "batch": batch,
        "micro_batch": micro_batch,
        "state_bytes": 3 * 4 * batch * 3 * 32 * 32,  # images and two moments, float32
        "working_bytes": int(printed),
    }
    print(
        f"  {batch:6d} images, {'one piece' if micro_batch is None else f'{micro_batch} at a time':13s} {_mb(case)}", flush=True
    )
    return case


def _mb(case: dict) -> str:
    return f"{case['working_bytes'] / 1e6:8.1f} MB to work, {case['state_bytes'] / 1e6:8.1f} MB of images and Adam"


# ---- time ----


def time_case(batch: int, micro_batch: int, pairs: int) -> dict:
    """Seconds of a step in one piece, of one in micro-batches, and of a forward pass alone: medians, and of their ratios."""
    from units import Unit

    unit = Unit(batch)
    images = torch.randn(batch, 3, 32, 32)
    seconds = {"plain": [], "virtual": [], "forward": []}
    for _ in range(pairs):
        seconds["plain"].append(unit.seconds_a_step())
        seconds["virtual"].append(unit.seconds_a_step(micro_batch=micro_batch))
        with torch.no_grad():
            started = time.perf_counter()
            for part in images.split(micro_batch):
                unit.objective.teacher(part)
            seconds["forward"].append(time.perf_counter() - started)
    ratio = lambda name: stats.median(a / b for a, b in zip(seconds[name], seconds["plain"]))
    case = {
        "batch": batch,
        "micro_batch": micro_batch,
        "pairs": pairs,
        "seconds": {name: stats.median(values) for name, values in seconds.items()},
        "virtual_over_plain": ratio("virtual"),
        "forward_over_plain": ratio("forward"),
    }
    print("  " + _time_text(case))
    return case


def _time_text(case: dict) -> str:
    return (
        f"A step of {case['batch']} images takes {case['seconds']['plain'] * 1e3:.0f} ms in one piece and "
        f"{case['seconds']['virtual'] * 1e3:.0f} ms in micro-batches of {case['micro_batch']}: "
        f"{times(case['virtual_over_plain'])} (median of {case['pairs']} pairs), where a whole forward pass more would be "
        f"{times(1 + case['forward_over_plain'])}."
    )


def before(only: str) -> dict:
    """What was measured before of the other half, if it was here and with these versions."""
    result, now = json.loads((RESULTS / f"{NAME}.json").read_text()), measured_on(torch.device("cpu"))
    others = [name for name, value in now.items() if name != "date" and result[name] != value]
    if others:
        raise SystemExit(f"the results there are were measured under another {', '.join(others)}: measure both, without --only")
    return {"memory": result["memory"]} if only == "time" else {"time": result["time"]}


# ---- the page ----


def write_report(result: dict) -> None:
    plain = {case["batch"]: case for case in result["memory"] if case["micro_batch"] is None}
    cut = [case for case in result["memory"] if case["micro_batch"] is not None]
    rows = [["images in the batch", f"to work, {cut[0]['micro_batch']} at a time", "to work, in one piece", "images and Adam"]]
    for case in cut:
        whole = plain.get(case["batch"])
        cells = [case["working_bytes"], whole and whole["working_bytes"], case["state_bytes"]]
        rows.append([f"{case['batch']:,}", *("" if value is None else f"{value / 1e6:,.0f} MB" for value in cells)])
    where = f"ResNet-20, images of 32×32, float32, {circumstances(result, NAME)}"
    write_block(PAGE, "figures", f"{where}\n\n{markdown(rows)}\n\n{_time_text(result['time'])}")
    draw(plain, cut, PICTURE)
    print(f"wrote {PAGE} and {PICTURE}")


def draw(plain: dict[int, dict], cut: list[dict], path: Path) -> None:
    """MB against the batch, both in powers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = (
        (cut, "working_bytes", f"working memory, {cut[0]['micro_batch']} images at a time", dict(color="#0b6e4f", marker="o")),
        (list(plain.values()), "working_bytes", "working memory, in one piece", dict(color="#bc4b51", marker="^")),
        (cut, "state_bytes", "the images and Adam's moments", dict(color="#8d99ae", linestyle="--")),
    )
    for cases, what, label, style in lines:
        axes.plot([case["batch"] for case in cases], [case[what] / 1e6 for case in cases], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="images in the batch", ylabel="MB")
    axes.set_xscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(True, which="major", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches of up to 256 and one pair; prints, writes nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing, write page and picture from the results")
    parser.add_argument("--only", choices=("memory", "time"), help="measure one; the other stays as it is in the results")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--largest", type=int, default=65536, help="largest batch (default 65536)")
    parser.add_argument("--largest-plain", type=int, default=4096, help="largest batch in one piece (default 4096)")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of steps that are timed (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", type=int, nargs=2, metavar=("BATCH", "MICRO_BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(measure_memory(args.measure[0], args.measure[1] or None))
        return
    if args.report:
        write_report(json.loads((RESULTS / f"{NAME}.json").read_text()))
        return
    figures = before(args.only) if args.only else {}
    largest, largest_plain, pairs = (256, 256, 1) if args.quick else (args.largest, args.largest_plain, args.pairs)
    if "memory" not in figures:
        batches = [args.micro_batch]
        while batches[-1] * 4 <= largest:
            batches.append(batches[-1] * 4)
        if batches[-1] < largest:
            batches.append(largest)
        print("memory of a step:")
        memory = [memory_case(batch, args.micro_batch, args.threads) for batch in batches]
        memory += [memory_case(batch, None, args.threads) for batch in batches if batch <= largest_plain]
        figures["memory"] = memory
    if "time" not in figures:
        print("time of a step:")
        figures["time"] = time_case(256, args.micro_batch, pairs)
    if not args.quick:
        path = write_result(NAME, COMMAND, memory=figures["memory"], time=figures["time"])
        write_report(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
