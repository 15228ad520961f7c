"""Compiles the Triton kernels for a GPU that need not be there, as launches at real shapes would; prints the result as JSON.

    python compile_triton.py 90

The launchers run on meta tensors, which have shapes, strides and aligned addresses but no memory, so that tiles, warps and what
the compiler knows of its arguments are those of a real launch. Started by test_triton_compiles.py in a process of its own, for
Triton must not have been imported to interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from bnfuse.kernels import boundary
from triton.backends.compiler import GPUTarget

from bnfuse import kernels, reference

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def disassembly(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """REG, STACK, LOCAL and SHARED, and the machine's accesses to global memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    accesses = re.findall(r"\s((?:LDG|LDGSTS|STG)\.\S*)", sass)
    return dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, resources.groups()))), accesses


class Compiler:
    """Stands for `boundary.launch`: compiles what it would start."""

    def __init__(self):
        self.found = {}

    def __call__(self, kernel, programs, *arguments, **options):
        compiled = kernel.warmup(*arguments, grid=(programs,), **options)
        if compiled.hash not in self.found:
            resources, accesses = disassembly(compiled.asm["cubin"])
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            self.found[compiled.hash] = {
                "kernel": kernel.__name__,
                "dtype": str(tensors[0].dtype).removeprefix("torch."),
                "options": {k: v for k, v in options.items() if isinstance(v, (int, str, bool))},
                "wide": bool(options.get("UNIT") == boundary.ALIGNMENT),
                **resources,
                "accesses": sorted(set(accesses)),
            }


def compile_site(
    shape, dtype, *, act="relu", residual=False, layout=torch.channels_last, groups=1, distance=None, in_place=False
):
    """Every kernel of one site."""
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
    moments = {"dtype": reference.moment_dtype(dtype), "device": "meta"}
    channel, table = torch.empty(shape[1], **moments), torch.empty(groups, shape[1], **moments)
    starts = torch.empty(groups + 1, dtype=torch.int64, device="meta")
    given = x, x if residual else None, channel, channel, starts
    if distance is None:
        mask = kernels.bn_forward(*given, act, 0.01)[3]
    else:
        classes = torch.empty(groups, dtype=torch.int64, device="meta")
        options = 1.0, act, 0.01, distance, False, 1e-8, 0.0, 1.0, 1.0
        targets = torch.empty(1000, shape[1], **moments)
        mask = kernels.bn_forward_with_targets(*given, targets, targets, classes, *options)[3]
    kept = x if residual and not mask.numel() and act != "identity" else None
    backward = kernels.bn_backward_ if in_place else kernels.bn_backward
    wants_dresidual = residual and act != "identity"
    backward(x, x, kept, mask, channel, channel, table, table, table, starts, act, 0.01, wants_dresidual)


def compile_loss(distance, groups=1):
    """The loss of ResNet-50's sites."""
    channels = [64, *[64, 64, 256] * 3, *[128, 128, 512] * 4, *[256, 256, 1024] * 6, *[512, 512, 2048] * 3]
    moments = [torch.empty(groups, c, device="meta") for c in channels]
    table = torch.empty(1, sum(channels), device="meta")
    weights = torch.empty(len(channels), device="meta")
    kernels.bn_loss(moments, moments, table, table, None, weights, distance, False, 1e-8, 0.0, 1.0, 1.0)


def main(capability: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    boundary.check_device = lambda tensor: None
    boundary.launch = compiler = Compiler()
    narrow, single = torch.bfloat16, torch.float32
    # ResNet-50 at 224, a batch of 256: its stem, the widest and the narrowest site, each with what it has of residuals.
    compile_site((256, 64, 112, 112), narrow)
    compile_site((256, 256, 56, 56), narrow, residual=True)
    compile_site((256, 256, 56, 56), single, residual=True)
    compile_site((256, 2048, 7, 7), torch.float16, act="identity", residual=True, groups=100, distance="l2")
    compile_site((256, 64, 112, 112), narrow, layout=torch.contiguous_format)
    compile_site((256, 256, 56, 56), single, residual=True, layout=torch.contiguous_format)
    compile_site((256, 2048, 7, 7), narrow, residual=True, layout=torch.contiguous_format)
    # MobileNetV2's, EfficientNet's and YOLO's activations; channels that fill no tile
    compile_site((256, 144, 56, 56), narrow, act="relu6", in_place=True)
    compile_site((256, 24, 56, 56), narrow, act="silu", residual=True)
    if capability == 90:
        compile_site((16, 64, 112, 112), torch.float16, act="hardswish", layout=torch.contiguous_format, groups=7)
        compile_site((8, 30), torch.float64, act="leaky_relu", residual=True, layout=torch.contiguous_format)
        for distance in ("l2", "kl", "hinge"):
            compile_loss(distance)
    else:
        compile_loss("l2", groups=10)
    moments = torch.empty(1, 512, device="meta")
    x = torch.empty(256, 512, 28, 28, dtype=narrow, device="meta").contiguous(memory_format=torch.channels_last)
    starts = torch.empty(2, dtype=torch.int64, device="meta")
    kernels.group_moments(x, starts)
    kernels.group_moments_backward(x, moments, moments, moments, starts)
    json.dump([*compiler.found.values()], sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
