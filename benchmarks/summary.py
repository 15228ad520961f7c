"""From the cases of a suite to its summary: geometric means over all sites, over each network's, over networks.

A case holds ratios, a rival's time over ours. Equal sites were timed once and count as often as the networks have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

# The run that a step's rate is turned into hours of, by networks that take ImageNet's images: the steps alone, one after the
# other on one device, without augmentation and without writing anything.
IMAGENET_RUN = {"classes": 1000, "images_per_class": 50, "iterations": 4000}
IMAGENET_SIZE = 224


def geometric_mean(values: Iterable[tuple[float, int]]) -> float | None:
    """Of (value, weight); None of nothing."""
    values = list(values)
    if not values:
        return None
    return math.exp(sum(weight * math.log(value) for value, weight in values) / sum(weight for _, weight in values))


def with_sums(cases: list[dict]) -> list[dict]:
    """The cases of a GPU: forward and backward alone, and as "both" their sum at every site where both were timed.

    What was timed of both at once is left out: where backward takes long to queue, that contains waiting for the host.
    """
    alone = [case for case in cases if case["direction"] != "both"]
    backward_of = {case["site"]: case for case in alone if case["direction"] == "backward"}
    sums = []
    for forward in alone:
        site = forward["site"]
        if forward["direction"] != "forward" or not (backward := backward_of.get(site)):
            continue
        seconds = {name: time + backward["seconds"][name] for name, time in forward["seconds"].items()}
        sums.append(
            {
                "site": site,
                "networks": forward["networks"],
                "direction": "both",
                "bytes": forward["bytes"] + backward["bytes"],
                "seconds": seconds,
                "ratios": {name: time / seconds["bnfuse"] for name, time in seconds.items() if name != "bnfuse"},
            }
        )
    return alone + sums


def summarize_operators(cases: list[dict]) -> dict:
    """Forward and backward together, over all sites; the same for each network and, below `directions`, for each direction."""
    both = [case for case in cases if case["direction"] == "both"]
    summary = operator_means(both)
    networks = dict.fromkeys(name for case in both for name in case["networks"])
    summary["operators_by_network"] = {name: operator_means(both, name) for name in networks}
    directions = dict.fromkeys(case["direction"] for case in cases)
    summary["operators_by_direction"] = {
        direction: operator_means([case for case in cases if case["direction"] == direction]) for direction in directions
    }
    return summary


def operator_means(cases: list[dict], network: str | None = None) -> dict:
    """Over the sites of one network, or of all."""
    weighed = [
        (case["ratios"], count)
        for case in cases
        if (count := sum(n for name, n in case["networks"].items() if network in (None, name)))
    ]

    def mean(*rivals: str) -> float | None:
        """Over the fastest of these at each site; sites that were not compiled for do not count."""
        return geometric_mean(
            (min(ratios[r] for r in rivals), count) for ratios, count in weighed if ratios.keys() >= {*rivals}
        )

    return {
        "op_speedup_vs_eager": mean("hook"),
        "op_speedup_vs_var_mean": mean("var_mean"),
        "op_speedup_vs_compile": mean("compiled_hook", "compiled_var_mean"),
        "op_speedup_vs_compiled_hook": mean("compiled_hook"),
        "op_speedup_vs_compiled_var_mean": mean("compiled_var_mean"),
        "op_speedup_vs_plain": mean("plain"),
        "op_time_over_floor": 1 / mean("floor") if weighed else None,
        "op_lowest_speedup_vs_eager": min((ratios["hook"] for ratios, _ in weighed), default=None),
        "op_lowest_speedup_vs_plain": min((ratios["plain"] for ratios, _ in weighed), default=None),
        "sites": sum(count for _, count in weighed),
        "compiled_sites": sum(count for ratios, count in weighed if "compiled_hook" in ratios),
    }


def summarize_steps(cases: list[dict]) -> dict:
    by_network = {case["network"]: _step_means([case]) | _step_rates(case) for case in cases}
    return _step_means(cases) | {"steps_by_network": by_network, "imagenet_run": IMAGENET_RUN}


def _step_rates(case: dict) -> dict:
    """Image-iterations a second of every contender, and the hours that they make of the ImageNet run."""
    rates = {name: case["batch"] / seconds for name, seconds in case["seconds"].items()}
    result = {"image_iterations_per_second": rates}
    if case["image_size"] == IMAGENET_SIZE:
        result["imagenet_hours"] = {name: math.prod(IMAGENET_RUN.values()) / rate / 3600 for name, rate in rates.items()}
    return result


def _step_means(cases: list[dict]) -> dict:
    def mean(rival: str) -> float:
        return geometric_mean((case["ratios"][rival], 1) for case in cases)

    summary = {
        "step_speedup_vs_eager": mean("hook"),
        "step_time_over_plain": 1 / mean("plain"),
        "step_time_over_conv_only": 1 / mean("conv_only"),
    }
    for key, rival in {"step_speedup_vs_compile": "compiled_hook", "step_speedup_vs_eager_autocast": "autocast_hook"}.items():
        if all(rival in case["ratios"] for case in cases):
            summary[key] = mean(rival)
    return summary


def summarize_memory(cases: list[dict]) -> dict:
    return _memory_means(cases) | {"memory_by_network": {case["network"]: _memory_means([case]) for case in cases}}


def _memory_means(cases: list[dict]) -> dict:
    summary = {}
    for what in ("kept", "peak"):
        pairs = [case[f"{what}_bytes"] for case in cases if f"{what}_bytes" in case]
        if pairs:
            summary[f"{what}_over_eager"] = geometric_mean((pair["bnfuse"] / pair["hook"], 1) for pair in pairs)
    return summary


SUMMARIES = {"operators": summarize_operators, "steps": summarize_steps, "memory": summarize_memory}
