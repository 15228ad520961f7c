"""What one batch over many GPUs costs, on paper: bytes and latencies of its all-reduce against the step's arithmetic.

    python benchmarks/scaling_model.py             # prints the tables
    python benchmarks/scaling_model.py --report    # puts them into docs/scaling.md

Nothing is measured here. The number of channels is counted in the network; what the hardware does is assumed, in
`Assumptions`, and can be given on the command line.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields

import torch
from report import ROOT, markdown, write_block

PAGE = ROOT / "docs/scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUPS = (1, 10, 100, 1000)


@dataclass(frozen=True)
class Assumptions:
    """What the tables rest on.

    Attributes
    ----------
    node : GPUs that NVLink connects
    nvlink : bytes a second that a GPU sends over NVLink, and receives at the same time: 900 GB/s both ways in an H100
    network : bytes a second that a GPU sends into the network: one port of InfiniBand NDR, 400 Gbit/s, for each
    efficiency : the share of both that collectives get
    nvlink_latency, network_latency : seconds a hop
    launch : seconds that an all-reduce takes to get under way
    flops : floating-point operations a second that the network sustains in bfloat16, as training a ResNet-50 does, which is
        bound by memory: some 3,000 images a second of three passes
    gflop : of an image, ResNet-50 at 224: 4.1 G multiply-adds forward, as many backward to the image
    images : images of a GPU in a step, where the batch grows with the GPUs
    """

    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    efficiency: float = 0.8
    nvlink_latency: float = 3e-6
    network_latency: float = 6e-6
    launch: float = 20e-6
    flops: float = 75e12
    gflop: float = 16.4
    images: int = 128


def reduced_bytes(groups: int, channels: int, terms: int = 2) -> int:
    """Σ(x − c) and Σ(x − c)² of each group and channel, and the loss terms, in float64."""
    return 8 * (2 * groups * channels + terms)


def all_reduce_seconds(size: int, gpus: int, given: Assumptions) -> float:
    """A ring inside each node; between nodes, each GPU with its namesakes on its part, the faster of ring and tree."""
    inside, nodes = min(gpus, given.node), math.ceil(gpus / given.node)
    nvlink, network = given.nvlink * given.efficiency, given.network * given.efficiency
    seconds = given.launch + 2 * (inside - 1) * (size / inside / nvlink + given.nvlink_latency)
    if nodes > 1:
        part = size / inside
        ring = 2 * (nodes - 1) * (part / nodes / network + given.network_latency)
        tree = 2 * part / network + 2 * math.log2(nodes) * given.network_latency
        seconds += min(ring, tree)
    return seconds


def step_seconds(images: float, given: Assumptions) -> float:
    return images * given.gflop * 1e9 / given.flops


def resnet50_channels() -> int:
    """Channels of the inputs of all BatchNorm layers."""
    from sites import NETWORKS

    with torch.device("meta"):
        model = NETWORKS["resnet50"].build()
    return sum(layer.num_features for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d))


def tables(given: Assumptions) -> str:
    channels = resnet50_channels()
    sizes = {groups: reduced_bytes(groups, channels) for groups in GROUPS}
    head = [f"{groups} group{'s' * (groups > 1)}, {size / 1e6:,.1f} MB" for groups, size in sizes.items()]
    seconds = {gpus: [all_reduce_seconds(size, gpus, given) for size in sizes.values()] for gpus in GPUS}
    cost = [["GPUs", *head]]
    cost += [[str(gpus), *(f"{value * 1e3:.2f} ms" for value in row)] for gpus, row in seconds.items()]
    weak, strong = [["GPUs", "images in the batch", *head]], [["GPUs", "images of a GPU", *head]]
    for gpus, row in seconds.items():
        step, part = step_seconds(given.images, given), GPUS[-1] * 8 / gpus
        weak.append([str(gpus), f"{gpus * given.images:,}", *(_share(value, step) for value in row)])
        strong.append([str(gpus), f"{part:,.0f}", *(_share(value, step_seconds(part, given)) for value in row)])
    assumed = ", ".join(f"{f.name} {getattr(given, f.name):g}" for f in fields(given))
    return "\n\n".join(
        [
            f"ResNet-50 has {channels:,} channels in front of its BatchNorm layers. Assumed: {assumed} "
            "(`python benchmarks/scaling_model.py`).",
            "The all-reduce of a step, by the groups (classes) of the batch:",
            markdown(cost),
            f"Its share of a step of {given.images} images a GPU, {step_seconds(given.images, given) * 1e3:.1f} ms of "
            "arithmetic, the batch growing with the GPUs:",
            markdown(weak),
            f"And of one batch of {GPUS[-1] * 8:,} images, whatever the number of GPUs:",
            markdown(strong),
        ]
    )


def _share(communication: float, arithmetic: float) -> str:
    return f"{communication / (communication + arithmetic):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="put the tables into docs/scaling.md")
    for f in fields(Assumptions):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default)
    args = parser.parse_args()
    text = tables(Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)}))
    print(text)
    if args.report:
        write_block(PAGE, "model", text)


if __name__ == "__main__":
    main()
