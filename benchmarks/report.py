"""Turns benchmarks/results/*.json into the tables of README and docs/gpu.md, and the roofline picture. Measures nothing.

python benchmarks/report.py            # rewrites what stands between the pages' markers, and the picture
python benchmarks/report.py --check    # exits with 1 where a page says something else than the results
python benchmarks/report.py --gpu DIR [--since FILE]  # prints the tables of DIR's results of a GPU, of those alone that are
                                                      # newer than the file, and leaves them in DIR/gpu.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import median

from results_file import RESULTS
from summary import geometric_mean, operator_means, summarize_operators, with_sums

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs/images/roofline.png"
GPU_PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
SIZES = ((0, 8e6, "less than 8 MB"), (8e6, 32e6, "8 to 32 MB"), (32e6, float("inf"), "more"))  # bytes
NAMES = {"resnet20": "ResNet-20", "resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}

# (what it is, path in a summary, "at least" or "at most", the target); in float32, on two threads of a CPU
OPERATOR_TARGETS = [
    ("over the eager hook", ("op_speedup_vs_eager",), "≥", 10.0),
    ("over torch.compile, the faster of two spellings at each site", ("op_speedup_vs_compile",), "≥", 8.0),
    ("time over the copy floor", ("op_time_over_floor",), "≤", 1.6),
    ("over the eager hook, the worst site", ("op_lowest_speedup_vs_eager",), "≥", 4.0),
    ("over plain BN + activation without statistics, the worst site", ("op_lowest_speedup_vs_plain",), "≥", 1.0),
]
STEP_TARGETS = [
    ("time over the plain step, geometric mean", ("step_time_over_plain",), "≤", 1.0),
    ("ResNet-20, over the eager hook", ("steps_by_network", "resnet20", "step_speedup_vs_eager"), "≥", 2.2),
    ("ResNet-20, over the compiled hook", ("steps_by_network", "resnet20", "step_speedup_vs_compile"), "≥", 1.0),
    ("ResNet-18, over the eager hook", ("steps_by_network", "resnet18", "step_speedup_vs_eager"), "≥", 1.75),
]
MEMORY_TARGETS = [("activations kept, over the eager hook's", ("kept_over_eager",), "≤", 0.5)]
TARGETS = OPERATOR_TARGETS + STEP_TARGETS + MEMORY_TARGETS

# The same for a GPU, of its results in bfloat16 and channels_last: (what it is, suite, its measure, sense, the target, unit)
GPU_TARGETS = [
    (
        "ResNet-50's sites forward, of copy bandwidth",
        "operators",
        lambda r: _copy_share(r, "resnet50", "forward"),
        "≥",
        85.0,
        "%",
    ),
    (
        "ResNet-50's sites backward, of copy bandwidth",
        "operators",
        lambda r: _copy_share(r, "resnet50", "backward"),
        "≥",
        85.0,
        "%",
    ),
    ("ResNet-50's sites, over the eager hook", "operators", lambda r: _site_mean(r, "resnet50", "hook"), "≥", 6.0, "×"),
    (
        "ResNet-50's sites, over torch.compile, the faster of two spellings",
        "operators",
        lambda r: _site_mean(r, "resnet50", "compiled_hook", "compiled_var_mean"),
        "≥",
        1.5,
        "×",
    ),
    (
        "ResNet-50 step, over the eager hook under autocast",
        "steps",
        lambda r: _step(r, "resnet50", "autocast_hook"),
        "≥",
        2.5,
        "×",
    ),
    ("ResNet-50 step, over the compiled hook", "steps", lambda r: _step(r, "resnet50", "compiled_hook"), "≥", 1.3, "×"),
    ("ResNet-50 step, time over the plain step", "steps", lambda r: 1 / _step(r, "resnet50", "plain"), "≤", 1.0, "×"),
    ("ResNet-50 step, peak memory over the eager hook's", "memory", lambda r: _peak_share(r, "resnet50"), "≤", 0.5, "×"),
    ("ImageNet at 50 a class, ResNet-18", "steps", lambda r: _hours(r, "resnet18"), "≤", 3.0, " h"),
]


# ---- tables: lists of rows of cells, printed as markdown ----


def markdown(rows: list[list[str]]) -> str:
    """The first row is the head; numbers stand to the right."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(value: float | None) -> str:
    """A ratio; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.2f}×" if value < 9.95 else f"{value:.1f}×"


def operators_table(result: dict) -> str:
    """Geometric means, forward and backward together, a row a network."""
    summary = result["summary"]
    columns = {
        "eager hook": "op_speedup_vs_eager",
        "`var_mean`": "op_speedup_vs_var_mean",
        "compiled hook": "op_speedup_vs_compiled_hook",
        "compiled `var_mean`": "op_speedup_vs_compiled_var_mean",
        "plain BN + act": "op_speedup_vs_plain",
        "time over floor": "op_time_over_floor",
    }
    others = [name for name in ("cuda", "triton") if all(name in case["ratios"] for case in result["operators"])]
    rows = [["faster than", *columns, "of copy bandwidth", *(f"`{name}`" for name in others)]]

    def cell(means: dict, key: str) -> str:
        """A mean over some of the sites says of how many."""
        some = "compile" in key and 0 < means.get("compiled_sites", means["sites"]) < means["sites"]
        return times(means[key]) + (f" ({means['compiled_sites']} of {means['sites']})" if some else "")

    def add(label: str, means: dict, network: str | None = None, direction: str = "both") -> None:
        weighed = _weighed(result["operators"], network, direction)
        beside = [times(geometric_mean((case["ratios"][name], n) for case, n in weighed)) for name in others]
        rows.append([label, *(cell(means, key) for key in columns.values()), f"{_share(weighed):.0%}", *beside])

    for name, means in summary["operators_by_network"].items():
        add(f"{NAMES.get(name, name)}, {means['sites']} sites", means, network=name)
    add(f"all, {summary['sites']} sites", summary)
    for direction in ("forward", "backward"):
        if means := summary["operators_by_direction"].get(direction):
            add(f"all, {direction} alone", means, direction=direction)
    return markdown(rows)


def sizes_table(result: dict) -> str:
    """Forward and backward together, a row for the sites that move so many bytes."""
    rows = [["sites that move", "sites", "over the eager hook", "over plain BN + act", "time over floor", "of copy bandwidth"]]
    for least, most, label in SIZES:
        both = [case for case in result["operators"] if case["direction"] == "both" and least <= case["bytes"] < most]
        if both:
            means = operator_means(both)
            speedups = [times(means[f"op_{key}"]) for key in ("speedup_vs_eager", "speedup_vs_plain", "time_over_floor")]
            rows.append([label, str(means["sites"]), *speedups, f"{_share(_weighed(both, None, 'both')):.0%}"])
    return markdown(rows)


def convolutions_table(layers: list[dict]) -> str:
    """What convolutions.py measured of a network: a row a layer, and the sum over all calls with images in that form."""
    forms = list(dict.fromkeys(form for layer in layers for form in layer["seconds"]))
    in_form = lambda layer, form: layer["seconds"].get(form, layer["seconds"][form.replace("over cells", "as it is")])
    ours = "over cells" if "over cells" in forms else "as it is"
    speed = lambda gigaflop, seconds: f"{gigaflop / 1e3 / seconds:.2f}"
    rows = [["input", "layer", "calls", "GFLOP", *(f"{form}, ms" for form in forms), "TFLOP/s"]]
    for layer in layers:
        times = [f"{1e3 * layer['seconds'][form]:.2f}" if form in layer["seconds"] else "" for form in forms]
        cells = "×".join(map(str, layer["input"])), layer["layer"], str(layer["calls"]), f"{layer['gigaflop']:.1f}"
        rows.append([*cells, *times, speed(layer["gigaflop"], in_form(layer, ours))])
    total = lambda value: sum(layer["calls"] * value(layer) for layer in layers)
    flop, seconds = total(lambda layer: layer["gigaflop"]), {f: total(lambda layer, f=f: in_form(layer, f)) for f in forms}
    times = [f"{1e3 * taken:.2f}" for taken in seconds.values()]
    rows.append(["all", "", str(total(lambda _: 1)), f"{flop:.1f}", *times, speed(flop, seconds[ours])])
    return markdown(rows)


def small_planes_table(result: dict) -> str:
    """Shares of the copy bandwidth over the planes and channels of small_planes.py, a row a direction and layout."""
    rows = [["of copy bandwidth", "least", "next", "median", "most"]]
    shares = result["share_of_copy_bandwidth"]
    for direction in ("forward", "backward"):
        for layout in dict.fromkeys(share["layout"] for share in shares):
            found = sorted((s for s in shares if s["layout"] == layout), key=lambda s: s[direction])
            cells = [f"{s[direction]:.0%} ({_plane(s)})" for s in found[:2]]
            cells += [f"{median(s[direction] for s in found):.0%}", f"{found[-1][direction]:.0%}"]
            rows.append([f"{direction}, {layout}", *cells])
    return markdown(rows)


def _plane(share: dict) -> str:
    side = f"{share['plane']}×{share['plane']}"
    return f"{side}, {share['channels']} channels" + (" and a residual" if share["residual"] else "")


def _weighed(cases: list[dict], network: str | None, direction: str) -> list[tuple[dict, int]]:
    """The cases of a network, or of all, in one direction, and how often each counts."""
    counts = [(case, sum(n for name, n in case["networks"].items() if network in (None, name))) for case in cases]
    return [(case, count) for case, count in counts if count and case["direction"] == direction]


def _share(weighed: list[tuple[dict, int]]) -> float:
    """Of the copy bandwidth, weighted by bytes. KeyError where there is no case."""
    if not weighed:
        raise KeyError("no such site was measured")
    floor, ours = (sum(n * case["seconds"][name] for case, n in weighed) for name in ("floor", "bnfuse"))
    return floor / ours


def sites_table(result: dict) -> str:
    """Microseconds of every site on each GPU backend, a direction at a time, and its part of the copy bandwidth."""
    backends = {result["backend"]: "bnfuse"}  # what `auto` took goes by that name
    backends |= {name: name for name in ("cuda", "triton") if all(name in case["seconds"] for case in result["operators"])}
    directions = ("forward", "backward")
    cases = {(case["site"], case["direction"]): case for case in result["operators"]}

    def cells(case: dict) -> list[str]:
        seconds, floor = {name: case["seconds"][key] for name, key in backends.items()}, case["seconds"]["floor"]
        return [f"{case['bytes'] / 1e6:.0f}", *(f"{time * 1e6:.0f} ({floor / time:.0%})" for time in seconds.values())]

    rows = [["site", *(head for d in directions for head in (f"{d}, MB", *(f"`{name}`, µs" for name in backends)))]]
    for site in dict.fromkeys(site for site, _ in cases):
        rows.append([site, *(cell for d in directions for cell in cells(cases[site, d]))])
    return markdown(rows)


def gpu_times(result: dict) -> str:
    """What the times of a GPU's sites are, and whose may contain waiting for the host."""
    together = "Forward and backward are timed alone, and what stands for both is their sum."
    cases = [case for case in result["operators"] if case["direction"] != "both"]
    if any("waited_for_host" not in case for case in cases):
        return f"{together} Whether the device waited for the host in some rounds was not noted in this run."
    of_sites = Counter((name, case["direction"]) for case in cases for name in case["waited_for_host"])
    found = ", ".join(f"`{name}` {direction} at {n} sites" for (name, direction), n in of_sites.items())
    return f"{together} In some rounds the device may have waited for the host: {found or 'of nobody'}."


STEP_RIVALS = {
    "hook": "eager hook",
    "autocast_hook": "eager hook, autocast",
    "compiled_hook": "compiled hook",
    "plain": "no statistics",
    "conv_only": "convolutions alone",
    "autocast_bnfuse": "bnfuse, autocast",
    "cuda": "`cuda`",
    "triton": "`triton`",
}


def steps_table(result: dict) -> str:
    """Milliseconds, a row a network; on a GPU also what they make of a run on ImageNet."""
    rivals = {name: head for name, head in STEP_RIVALS.items() if any(name in case["ratios"] for case in result["steps"])}
    rows = [["step", "bnfuse", *rivals.values()]]
    for case in result["steps"]:
        cells = [f"{case['seconds']['bnfuse'] * 1e3:.0f} ms"]
        for name in rivals:
            known = name in case["ratios"]
            cells.append(f"{case['seconds'][name] * 1e3:.0f} ms ({times(case['ratios'][name])})" if known else "")
        rows.append([f"{NAMES.get(case['network'], case['network'])}, {case['batch']} images", *cells])
    on_gpu = result["settings"]["device"] == "cuda"
    return "\n\n".join(filter(None, [markdown(rows), imagenet_table(result["summary"]) if on_gpu else ""]))


def imagenet_table(summary: dict) -> str:
    """Images × iterations a second, and the hours of a whole dataset at that rate; nothing where no network is for ImageNet."""
    networks = {name: means for name, means in summary["steps_by_network"].items() if "imagenet_hours" in means}
    contenders = [
        name
        for name in ("bnfuse", "hook", "autocast_hook", "compiled_hook")
        if any(name in means["imagenet_hours"] for means in networks.values())
    ]
    run = "{classes:,} classes × {images_per_class} images × {iterations:,} iterations".format(**summary["imagenet_run"])
    rows = [
        [f"images × iterations a second (hours of {run})", *({"bnfuse": "bnfuse", **STEP_RIVALS}[name] for name in contenders)]
    ]
    for network, means in networks.items():
        rates, hours = means["image_iterations_per_second"], means["imagenet_hours"]
        cells = [f"{rates[name]:,.0f} ({hours[name]:.1f} h)" if name in hours else "" for name in contenders]
        rows.append([NAMES.get(network, network), *cells])
    return markdown(rows) if networks else ""


def memory_table(result: dict) -> str:
    """MB kept for backward and at the peak of a step."""
    measured = [what for what in ("kept", "peak") if all(f"{what}_bytes" in case for case in result["memory"])]
    columns = [(what, name) for what in measured for name in ("bnfuse", "hook", "plain")]
    names = {"bnfuse": "bnfuse", "hook": "eager hook", "plain": "no statistics"}
    rows = [["MB", *(f"{what}, {names[name]}" for what, name in columns)]]
    for case in result["memory"]:
        cells = [f"{case[f'{what}_bytes'][name] / 1e6:,.0f}" for what, name in columns]
        rows.append([f"{NAMES.get(case['network'], case['network'])}, {case['batch']} images", *cells])
    return markdown(rows)


_TARGETS_HEAD = ["target", "wanted", "measured", ""]


def targets_table(summary: dict, targets: list) -> str:
    """Each target that the summary has a figure for, and whether it is met."""
    rows = [_TARGETS_HEAD]
    for what, path, sense, wanted in targets:
        measured = summary
        for key in path:
            measured = measured.get(key, {}) if isinstance(measured, dict) else {}
        if isinstance(measured, float):
            rows.append([what, f"{sense} {wanted:g}×", times(measured), _verdict(measured, sense, wanted)])
    return markdown(rows) if len(rows) > 1 else ""


def _verdict(measured: float, sense: str, wanted: float) -> str:
    return "met" if (measured >= wanted if sense == "≥" else measured <= wanted) else "missed"


def gpu_targets(results: list[dict]) -> str:
    """A table a card, in which no other card's figures stand."""
    cards = dict.fromkeys(result["gpu"] for result in results)
    of = {card: gpu_targets_table([result for result in results if result["gpu"] == card]) for card in cards}
    return "\n\n".join(f"What we aim at, on an {card}:\n\n{table}" for card, table in of.items())


def gpu_targets_table(results: list[dict]) -> str:
    """Each of one GPU's targets; what no result has a figure for is not measured, which is said too."""
    rows = [_TARGETS_HEAD]
    meant = [r for r in results if (r["settings"]["dtype"], r["settings"]["layout"]) == ("bfloat16", "channels_last")]
    for what, suite, measure, sense, wanted, unit in GPU_TARGETS:
        measured = [value for r in meant if suite in r and (value := _known(measure, r)) is not None]
        cells = [f"{measured[0]:.2f}{unit}", _verdict(measured[0], sense, wanted)] if measured else ["", "not measured"]
        rows.append([what, f"{sense} {wanted:g}{unit}", *cells])
    return markdown(rows)


def _known(measure, result: dict) -> float | None:
    """None where the result lacks the network, or the rival was not run."""
    try:
        return measure(result)
    except (KeyError, StopIteration):
        return None


def _copy_share(result: dict, network: str, direction: str) -> float:
    """Percent of the copy bandwidth, weighted by bytes, over the network's sites."""
    return 100 * _share(_weighed(result["operators"], network, direction))


def _site_mean(result: dict, network: str, *rivals: str) -> float | None:
    """Over the fastest of these rivals at each site, both directions together."""
    weighed = _weighed(result["operators"], network, "both")
    return geometric_mean((min(case["ratios"][rival] for rival in rivals), n) for case, n in weighed)


def _step(result: dict, network: str, rival: str) -> float:
    return next(case["ratios"][rival] for case in result["steps"] if case["network"] == network)


def _peak_share(result: dict, network: str) -> float:
    peaks = next(case["peak_bytes"] for case in result["memory"] if case["network"] == network)
    return peaks["bnfuse"] / peaks["hook"]


def _hours(result: dict, network: str) -> float:
    return result["summary"]["steps_by_network"][network]["imagenet_hours"]["bnfuse"]


TABLES = {"operators": operators_table, "steps": steps_table, "memory": memory_table}


def terminal_tables(result: dict) -> str:
    """Everything that a run has measured, as the terminal shows it."""
    parts = [table(result) for suite, table in TABLES.items() if suite in result]
    parts.append(targets_table(result["summary"], TARGETS) if _aims(result) else "")
    return "\n\n".join(part for part in parts if part)


def _aims(result: dict) -> bool:
    """Whether the targets are meant for what this was measured on."""
    wanted = {"device": "cpu", "dtype": "float32", "layout": "contiguous"}
    return result["settings"] == wanted and result["threads"] == 2


def gpu_results(folder: Path, since: float = 0.0) -> dict[str, dict]:
    """The results in the folder that were measured on a GPU, by file; those alone that were written after a time."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.stat().st_mtime > since]
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    on_gpu = {name: result for name, result in results.items() if result.get("settings", {}).get("device") == "cuda"}
    for result in on_gpu.values():
        if "operators" in result:
            result["operators"] = with_sums(result["operators"])
            result["summary"] |= summarize_operators(result["operators"])
    return on_gpu


def gpu_report(results: dict[str, dict]) -> str:
    """The tables of every result of a GPU, each site's among them."""
    parts = []
    for name, result in results.items():
        sites = [gpu_times(result), sites_table(result)] if "operators" in result else []
        layers = [f"{n}:\n\n{convolutions_table(of['layers'])}" for n, of in result.get("convolutions", {}).items()]
        parts += [f"## {name}", gpu_circumstances(result), *filter(None, [terminal_tables(result), *sites, *layers])]
    parts += ["## Targets, in bfloat16 and channels_last", gpu_targets(list(results.values()))]
    return "\n\n".join(parts) + "\n"


def gpu_circumstances(result: dict) -> str:
    settings = result["settings"]
    where = f"{result['gpu']}, {settings['dtype']}, {settings['layout']}, torch {result['torch']}, {result['date']}"
    return f"{where}; `{result['command']}`"


def gpu_block(results: dict[str, dict]) -> str:
    """What README shows of a GPU: the sites in 16 bits, and the targets."""
    parts = []
    for name, result in results.items():
        if "operators" in result and result["settings"]["dtype"] == "bfloat16":
            where = f"{gpu_circumstances(result)} ([result](benchmarks/results/{name}.json))."
            parts += [f"{where} {gpu_times(result)}", operators_table(result)]
    return "\n\n".join([*parts, gpu_targets(list(results.values()))])


# ---- the README ----

INTRODUCTIONS = {
    "operators": "One BatchNorm site, forward and backward together: how many times faster bnfuse is, geometric means over the "
    "sites at their real shapes. The floor is what copying at {copy:.1f} GB/s, measured in the same rounds, needs for the "
    "passes over memory that no code can save.",
    "operators_channels_last": "The same sites in channels_last, the layout that a fused network runs in.",
    "steps": "A synthesis step: forward, cross-entropy and BatchNorm loss, backward to the images, Adam; in brackets the "
    "median of the rounds' ratios to bnfuse. Each rival runs contiguous and channels_last, and its faster layout counts.",
    "memory": "Memory of that step: activations kept for backward, and the peak over what lived before, each step in a "
    "process of its own.",
}


def readme_block(results: dict[str, dict]) -> str:
    """What stands between the markers; `results` by file."""
    parts = []
    for name, result in results.items():
        introduction = INTRODUCTIONS[name].format(copy=result["summary"].get("copy_gb_per_second", 0))
        parts += [introduction + f" {_circumstances(result, name)}", TABLES[name.partition("_")[0]](result)]
        if name == "operators":
            parts.append("By the bytes that forward and backward together have to move:")
            parts.append(sizes_table(result))
            parts.append("![Bandwidth of every site, against the bytes it moves](docs/images/roofline.png)")
    aiming = [result["summary"] for result in results.values() if _aims(result)]
    merged = {key: value for summary in aiming for key, value in summary.items()}
    if table := targets_table(merged, TARGETS):
        parts += ["What we aim at, in float32 on two threads:", table]
    return "\n\n".join(parts)


def _circumstances(result: dict, name: str) -> str:
    where = result.get("gpu") or f"{result['processor']}, {result['threads']} thread{'s' * (result['threads'] > 1)}"
    return (
        f"{where}, {result['settings']['dtype']}, torch {result['torch']}, {result['date']}; `make bench`, or "
        f"`{result['command']}` ([result](benchmarks/results/{name}.json))."
    )


def small_planes_block(result: dict) -> str:
    return f"{_where(result)} ([result](benchmarks/results/small_planes.json)).\n\n{small_planes_table(result)}"


def demo_rate_block(result: dict) -> str:
    """The steps of the demo's synthesis, as synthesis_rate.py times them."""
    rates = result["steps_per_second"]
    rows = [
        ["ResNet-20, 100 images of 8×8 a step", "steps a second"],
        ['`backend="cpp"`', f"{rates['cpp']:.1f}"],
        ['`backend="reference"`, eager PyTorch', f"{rates['reference']:.1f}"],
        [f"ratio, median of {result['pairs']} pairs", times(result["cpp_over_reference"])],
    ]
    return f"{_where(result)} ([result](benchmarks/results/synthesis_rate.json)).\n\n{markdown(rows)}"


def _where(result: dict) -> str:
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return f"{result['processor']}, {threads}, torch {result['torch']}, {result['date']}"


README_PARTS = {"small_planes": ("small planes", small_planes_block), "synthesis_rate": ("demo rate", demo_rate_block)}
"""Of the README, a part each: result → name of its markers, and what stands between them."""


def with_parts(readme: str) -> str:
    """The README with every part of which there is a result."""
    for name, (markers, block) in README_PARTS.items():
        if (path := RESULTS / f"{name}.json").is_file():
            readme = with_block(readme, block(json.loads(path.read_text())), f"<!-- {markers} -->", f"<!-- /{markers} -->")
    return readme


def load_results(folder: Path) -> dict[str, dict]:
    """The results of a full run, by file; those that are there."""
    paths = {name: folder / f"{name}.json" for name in INTRODUCTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def with_block(page: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with the block between its markers."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"the page has no {begin} … {end}; add the two markers, each on a line of its own")
    return f"{before}{begin}\n{block}\n{end}{after}"


def circumstances(result: dict, name: str) -> str:
    """Machine, versions and command of a result that a page in docs/ shows."""
    return f"{_where(result)}; `{result['command']}` ([result](../benchmarks/results/{name}.json))."


def write_block(page: Path, name: str, block: str) -> None:
    """Puts the block between <!-- name --> and <!-- /name --> of a page in docs/."""
    page.write_text(with_block(page.read_text(), block, f"<!-- {name} -->", f"<!-- /{name} -->"))


# ---- the picture ----


def draw_roofline(result: dict, path: Path) -> None:
    """GB/s of every site against the bytes it must move, one point a site and direction, below the measured copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, sharey=True, layout="constrained")
    ceiling = result["summary"]["copy_gb_per_second"]
    styles = {
        "bnfuse": dict(label="bnfuse", color="#0b6e4f", marker="o", zorder=4),
        "plain": dict(label="plain BN + act, no statistics", color="#8d99ae", marker="x", zorder=2),
        "compiled_hook": dict(label="compiled hook", color="#f4a259", marker="s", zorder=3),
        "hook": dict(label="eager hook", color="#bc4b51", marker="^", zorder=3),
    }
    for panel, direction in zip(panels, ("forward", "backward")):
        cases = [case for case in result["operators"] if case["direction"] == direction]
        for name, style in styles.items():
            # Useful bytes, the same for all: what somebody moves beyond them is his loss.
            points = [(case["bytes"] / 1e6, case["bytes"] / case["seconds"][name] / 1e9) for case in cases]
            panel.scatter(*zip(*points), s=22, linewidths=1.2 if name == "plain" else 0, alpha=0.85, **style)
        panel.axhline(ceiling, color="black", linewidth=1)
        across = panel.get_yaxis_transform()  # x in parts of the panel, y in data
        panel.text(0.99, ceiling * 1.04, f"copy, {ceiling:.1f} GB/s", ha="right", va="bottom", transform=across)
        panel.set(xscale="log", yscale="log", title=direction, xlabel="MB that the site must move")
        panel.grid(True, which="major", color="#e5e5e5")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylabel("useful GB/s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the README is not up to date")
    parser.add_argument("--gpu", type=Path, metavar="DIR", help="print and leave there the tables of its results on a GPU")
    parser.add_argument("--since", type=Path, metavar="FILE", help="with --gpu: results that are newer than this file alone")
    args = parser.parse_args()
    if args.gpu:
        since = args.since.stat().st_mtime if args.since else 0.0
        if not (results := gpu_results(args.gpu, since)):
            newer = f" that are newer than {args.since}" if args.since else ""
            raise SystemExit(f"no results of a GPU{newer} in {args.gpu}; run `make gpu` first")
        report = gpu_report(results)
        (args.gpu / "gpu.md").write_text(report)
        print(f"{report}\nwrote {args.gpu / 'gpu.md'}")
        return
    results, on_gpu = load_results(RESULTS), gpu_results(RESULTS)
    if not results:
        raise SystemExit(f"no results in {RESULTS}; run `make bench` first")
    wanted = {README: with_block(README.read_text(), readme_block(results))}
    if on_gpu:
        markers = "<!-- gpu -->", "<!-- /gpu -->"
        wanted[README] = with_block(wanted[README], gpu_block(on_gpu), *markers)
        wanted[GPU_PAGE] = with_block(GPU_PAGE.read_text(), gpu_report(on_gpu).rstrip(), *markers)
    wanted[README] = with_parts(wanted[README])
    if args.check:
        stale = [page.name for page, text in wanted.items() if page.read_text() != text]
        sys.exit(f"not what {RESULTS} has: {', '.join(stale)}; run `python benchmarks/report.py`" if stale else 0)
    for page, text in wanted.items():
        page.write_text(text)
    if "operators" in results:
        draw_roofline(results["operators"], PICTURE)
    print(f"wrote {', '.join(map(str, wanted))} and {PICTURE}")


if __name__ == "__main__":
    main()
