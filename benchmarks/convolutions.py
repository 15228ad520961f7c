"""Where the rest of a step goes: each convolution of a network forward and back to its input, one after the other.

    python benchmarks/convolutions.py                               # prints tables, and leaves results/convolutions.json
    python benchmarks/convolutions.py --networks resnet18           # prints one, and leaves that file as it is
    python benchmarks/convolutions.py --device cuda --batch 256 --dtype bfloat16     # …/convolutions_GPU_bfloat16_batch256.json

No code that deals with BatchNorm makes a step shorter than these. The convolution that images enter is timed as torch has it
and as bnfuse runs it, over cells of pixels (bnfuse/convolutions.py), after both have agreed with float64; on a GPU everything
is timed with `torch.backends.cudnn.benchmark` too, which lets cuDNN try its algorithms first.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import torch
from contenders import assert_near
from report import convolutions_table
from results_file import file_name, write_result
from sites import DTYPES, NETWORKS
from timing import Machine
from torch import Tensor, nn

from bnfuse.convolutions import FrozenConvolution, ImageConvolution, gains_by_cells
from bnfuse.models import freeze

Key = tuple[tuple[int, ...], str]  # the input's shape, the layer in words
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of a gradient, in norm
TF32_TOLERANCE = 2e-3
WARM_UP, ROUNDS = 2, 9
THREADS = 2


def convolutions_of(name: str, batch: int) -> tuple[dict[Key, nn.Conv2d], Counter]:
    """Each different convolution of a network as it is called with `batch` images, and how often."""
    with torch.device("meta"):
        model = NETWORKS[name].build().eval()
    found, calls = {}, Counter()

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], _) -> None:
        key = (tuple(inputs[0].shape), describe(layer))
        found.setdefault(key, layer)
        calls[key] += 1

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    model(torch.empty(batch, 3, NETWORKS[name].size, NETWORKS[name].size, device="meta"))
    for handle in handles:
        handle.remove()
    return found, calls


def describe(layer: nn.Conv2d) -> str:
    """As in 64 → 128, 3×3, stride 2."""
    words = [f"{layer.in_channels} → {layer.out_channels}", "×".join(map(str, layer.kernel_size))]
    words += [f"stride {layer.stride[0]}"] if layer.stride != (1, 1) else []
    words += [f"{layer.groups} groups"] if layer.groups > 1 else []
    return ", ".join(words)


def gigaflop(layer: nn.Conv2d, shape: tuple[int, ...]) -> float:
    """Of forward and of the way back to the input, a multiplication and an addition each counted."""
    outputs = layer(torch.empty(shape, device="meta")).numel()
    return 2 * 2 * outputs * layer.weight[0].numel() / 1e9


def verify(layer: nn.Conv2d, forms: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Raises AssertionError where a form's output or gradient of the first two images is away from float64's."""
    tf32 = x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    limit = TF32_TOLERANCE if tf32 else TOLERANCE[x.dtype]
    wide = copy.deepcopy(layer).double()

    def run(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        few = x[:2].detach().to(dtype).requires_grad_()
        y = module(few)
        return y.detach(), torch.autograd.grad(y, few, dy[:2].to(dtype))[0]

    exact = run(wide, torch.float64)
    for name, module in forms.items():
        for what, actual, expected in zip(("output", "gradient"), run(module, x.dtype), exact):
            assert_near(actual, expected, limit, f"{name}: {what}")


def time_layer(layer: nn.Conv2d, shape: tuple[int, ...], machine: Machine, dtype: torch.dtype) -> dict[str, float]:
    """Seconds forward and back, of each form in which the layer can run."""
    layer = freeze(layer.to_empty(device=machine.device)).to(dtype=dtype, memory_format=torch.channels_last)
    torch.manual_seed(0)
    layer.reset_parameters()
    x = torch.randn(shape, device=machine.device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    forms: dict[str, nn.Module] = {"as it is": FrozenConvolution(layer)}
    if gains_by_cells(layer):
        forms["over cells"] = ImageConvolution(layer)
    with torch.no_grad():
        dy = torch.randn_like(layer(x))
    verify(layer, forms, x, dy)
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(WARM_UP + ROUNDS):
        for form, module in forms.items():
            times[form].append(time_once(module, x, dy, machine))
    setting = ", cudnn.benchmark" if torch.backends.cudnn.benchmark else ""
    return {form + setting: median(seconds[WARM_UP:]) for form, seconds in times.items()}


def time_once(module: nn.Module, x: Tensor, dy: Tensor, machine: Machine) -> float:
    machine.flush()
    start = machine.clock()
    (dx,) = torch.autograd.grad(module(x), x, dy)
    taken = machine.clock() - start
    del dx  # freed untimed
    return taken


def time_networks(batches: dict[str, int], device: str, dtype: torch.dtype, tries: bool) -> dict[str, list[dict[str, float]]]:
    """The seconds of all layers of the networks; `tries`: cuDNN its algorithms."""
    torch.backends.cudnn.benchmark = tries
    machine = Machine(torch.device(device))
    layers = {name: convolutions_of(name, batch)[0] for name, batch in batches.items()}
    return {name: [time_layer(layer, key[0], machine, dtype) for key, layer in of.items()] for name, of in layers.items()}


def time_with_both_settings(*given) -> dict[str, list[dict[str, float]]]:
    """The same on a GPU: once a process has chosen an algorithm it stays with it, so each setting has one of its own."""
    found = []
    for tries in (False, True):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found.append(process.submit(time_networks, *given, tries).result())
    as_it_is, tried = found
    return {name: [a | b for a, b in zip(layers, tried[name])] for name, layers in as_it_is.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(NETWORKS)
    parser.add_argument("--networks", nargs="+", default=names, choices=names, help="some of them (default all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of activations and weights (default float32)")
    parser.add_argument("--batch", type=int, help="images (default each network's own, as in test_steps.py)")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"of PyTorch's pool (default {THREADS})")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    batches = {name: arguments.batch or NETWORKS[name].step_batch for name in arguments.networks}
    given = batches, arguments.device, dtype
    seconds = time_with_both_settings(*given) if device.type == "cuda" else time_networks(*given, False)
    networks = {}
    for name, batch in batches.items():
        layers, calls = convolutions_of(name, batch)
        described = [
            {"input": list(key[0]), "layer": key[1], "calls": calls[key], "gigaflop": gigaflop(layer, key[0])}
            for key, layer in layers.items()
        ]
        networks[name] = {"batch": batch, "layers": [a | {"seconds": b} for a, b in zip(described, seconds[name])]}
        print(f"{name}, {batch} images, {arguments.dtype}\n\n{convolutions_table(networks[name]['layers'])}\n")
    other_dtype = arguments.dtype if dtype != torch.float32 else None
    file = file_name("convolutions", device, other_dtype, f"batch{arguments.batch}" if arguments.batch else None)
    if file == "convolutions" and (arguments.networks != names or arguments.threads != THREADS):
        print(f"not written: {file}.json is of all networks, on {THREADS} threads")
        return
    command = " ".join(["python benchmarks/convolutions.py", *sys.argv[1:]])
    settings = {"device": device.type, "dtype": arguments.dtype, "layout": "channels_last"}
    figures = {"settings": settings, "summary": {}, "convolutions": networks}
    print(f"wrote {write_result(file, command, device=device, **figures)}")


if __name__ == "__main__":
    main()
