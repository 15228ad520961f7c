"""Where tensors come in and kernels are launched: device, dtype, shape and layout are checked here, once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from bnfuse import reference
from bnfuse.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# As triton itself decides when it meets @triton.jit: whether kernels run on the CPU, one program after the other, in numpy.
INTERPRETED = triton.knobs.runtime.interpret
ALIGNMENT = 16  # bytes, of the widest access
MOST_PLANE = 2**30  # elements: what is left of a plane is counted in 32 bits, a tile beyond its end included


def describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_device(tensor: Tensor) -> None:
    if not (tensor.is_cuda or INTERPRETED):
        raise InputError(
            f"the Triton kernels run on a CUDA device, got a tensor on {tensor.device}; move it there, take another backend, "
            "or set TRITON_INTERPRET=1 before Python starts to have them interpreted on the CPU, slowly"
        )


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != torch.Size(shape) or tensor.device != device:
        expected = f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
        raise InputError(f"{name} must be {expected}, got {describe(tensor)}")


def check_statistics(name: str, tensor: Tensor | None, x: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A small tensor of statistics, made contiguous; `shape` is [C] or [G, C]."""
    if tensor is None:
        return None
    check(name, tensor, reference.moment_dtype(x.dtype), shape, x.device)
    return tensor.contiguous()


def check_table(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Tensor:
    """Targets [K, width]; rows may be any distance apart."""
    check(name, tensor, dtype, shape, device)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def check_classes(classes: Tensor | None, groups: int, targets: int, device: torch.device) -> Tensor | None:
    """Each group's row of `targets` rows; None where there is one row for all."""
    if targets == 1:
        return None
    if classes is None:
        expected = f"pass classes, int64 [{groups}]"
        raise InputError(f"a table of {targets} targets needs the class of each group, got none; {expected}")
    check("classes", classes, torch.int64, (groups,), device)
    return classes.contiguous()


@dataclass(frozen=True)
class Walk:
    """x [N, C, *spatial] and its groups as the kernels see them."""

    planes: bool  # x is [N, C, L] in memory; otherwise [N·L, C]
    samples: int  # N
    channels: int  # C
    plane: int  # L
    groups: int  # G
    dtype: torch.dtype
    device: torch.device

    @property
    def layout(self) -> str:
        return "planes" if self.planes else "rows"

    @property
    def sample_units(self) -> int:
        """Units a sample: see tiles.py."""
        return 1 if self.planes else self.plane

    @property
    def unit(self) -> int:
        """What divides the length of a row or plane, up to a vector's elements: tells the compiler how both are aligned."""
        return math.gcd(self.plane if self.planes else self.channels, ALIGNMENT)

    @property
    def group_width(self) -> int:
        """A power of two that holds all groups."""
        return triton.next_power_of_2(self.groups)


def check_x(x: Tensor, group_starts: Tensor) -> Walk:
    check_device(x)
    if x.dtype not in DTYPES:
        raise InputError(f"x must be float32, bfloat16, float16 or float64, got {describe(x)}")
    if not 2 <= x.dim() <= 5:
        raise InputError(f"x must be [N, C, *spatial] with 0 to 3 spatial dimensions, got {describe(x)}")
    if x.numel() and not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        raise InputError(f"x must be contiguous or channels_last, got {describe(x)}; call contiguous() on it")
    if group_starts.dtype != torch.int64 or group_starts.dim() != 1 or len(group_starts) < 2 or group_starts.device != x.device:
        raise InputError(
            f"group_starts must be int64 [G + 1] on {x.device} with at least one group, got {describe(group_starts)}"
        )
    n, c = x.shape[:2]
    planes, plane = not reference.is_channels_last(x), x.numel() // max(1, n * c)
    if planes and plane > MOST_PLANE:
        raise InputError(f"x has planes of {plane} elements, more than {MOST_PLANE}")
    return Walk(planes, n, c, plane, len(group_starts) - 1, x.dtype, x.device)


def check_like_x(name: str, tensor: Tensor | None, x: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    # Strides of dimensions of size 1 address nothing and may differ.
    strides = all(a == b or size <= 1 for a, b, size in zip(tensor.stride(), x.stride(), x.shape)) or x.numel() == 0
    if tensor.dtype != x.dtype or tensor.shape != x.shape or tensor.device != x.device or not strides:
        raise InputError(f"{name} must have x's dtype, shape and strides, {describe(x)}, got {describe(tensor)}")
    return tensor


def aligned(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, copied if it starts within a vector.

    How wide accesses are decides which thread holds which element, and with it in which order they are added up; the same
    values must give the same bits wherever they lie.
    """
    return tensor if tensor is None or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a CUDA device the current one for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(kernel, programs: int, *arguments, **options) -> None:
    """Starts `programs` programs of a kernel on the device of its tensors."""
    if programs == 0:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with current(device):
        kernel[(programs,)](*arguments, **options)
