"""The memory of one step: what autograd keeps for backward, and the peak, on the CPU measured in a process of its own.

    python benchmarks/step_memory.py NETWORK CONTENDER BATCH DEVICE THREADS DTYPE LAYOUT     # prints bytes

Peak on CUDA: max_memory_allocated during the second step, less what was allocated before it. Peak on the CPU, Linux: the
largest resident set during the second step (VmHWM, reset through /proc/self/clear_refs), less the resident set before it;
glibc is made to give every block of 64 KiB and more back at once, and bnfuse what its kernels keep of the first step, so that
what is resident before the second is what lives. What bnfuse keeps while a step runs counts as the step's.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from bnfuse.backends import release_memory


def child_environment() -> dict[str, str]:
    """The environment of the measuring process: an allocator that holds nothing back."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def kept_bytes(loss: nn.Module, images: Tensor) -> int:
    """Bytes of the storages that forward and loss save for backward, each once, parameters, buffers and images left out.

    A saved tensor counts with its whole storage, for that is what it keeps alive.
    """
    leaf = images.clone().requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (leaf, *loss.parameters(), *loss.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(leaf)  # while it lives, no storage is freed whose address another could take
    del value
    return sum(saved.values())


def peak_bytes(step, device: torch.device) -> int:
    """Of the second call of `step`, over what lived before it."""
    step()
    peak = Peak(device)
    step()
    return peak.bytes()


class Peak:
    """The most memory since this was made, over what lived then: what bnfuse's CPU kernels only keep is released first."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            release_memory()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return _status("VmHWM") - self.before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main(network: str, contender: str, batch: str, device: str, threads: str, dtype: str, layout: str) -> None:
    from sites import DTYPES, LAYOUTS
    from steps import LOSSES, make_images, make_step, make_teacher

    torch.set_num_threads(int(threads))
    tensors = torch.device(device), DTYPES[dtype], LAYOUTS[layout]
    model = make_teacher(network, *tensors)
    images, labels = make_images(network, int(batch), model, tensors[2])
    print(peak_bytes(make_step(LOSSES[contender](model, labels), images), tensors[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
