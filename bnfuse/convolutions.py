"""Convolutions of a frozen network, whose weights ask for no gradient and whose images do.

They keep nothing of their input, and the one that the images enter runs in a form whose gradient is fast. The layers
themselves stay as they are: weights are shared with them, or laid out anew.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends

IMAGE_CHANNELS = 4  # a convolution of so many at most is taken for one that images enter
MOST_PADDING = 1.5  # times the taps of a kernel, that it may have with zeros; 3×3 of stride 2 has 1.8, and does not gain
TENSOR_CORE_CHANNELS = 8  # of 16 bits: what tensor cores take at a time


class FrozenConvolution(nn.Module):
    """A convolution that keeps nothing of its input for backward, where torch's own keeps all of it.

    The input's values are needed for the gradient of the weight alone, and a frozen network asks for none. Where that does not
    hold, and under a compiler (which decides for itself what to keep), the convolution runs as it is. Under autocast it rounds
    its arguments as torch's own does.
    """

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d):
        super().__init__()
        self.convolution = convolution

    def __getattr__(self, name: str):
        """The layer's own, which networks ask for, such as ``conv1.weight.dtype``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("convolution"), name)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convolution
        if not self._is_frozen() or not _keeps_nothing(x) or x.dim() != conv.weight.dim():
            return conv(x)
        return _frozen_convolution(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _is_frozen(self) -> bool:
        weight, bias = self.convolution.weight, self.convolution.bias
        return not (weight.requires_grad or bias is not None and bias.requires_grad)

    def extra_repr(self) -> str:
        return "keeps nothing of its input"


class ImageConvolution(FrozenConvolution):
    """A convolution of stride s that images enter, as one of stride 1 over their cells of s×s pixels.

    That is where images ask for a gradient; otherwise it runs as it is. With cells' pixels for channels [N, C·s², H/s, W/s] and
    the kernel filled up with zeros to whole cells, it is the same sum (space-to-depth, arXiv 2003.13630). Networks are trained
    without their images' gradient, so libraries have not made the convolution back to three channels, with a stride, fast; in
    this form it is one like any other. What both take is printed by `python benchmarks/convolutions.py`.
    """

    def forward(self, x: Tensor) -> Tensor:
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        if not wants_gradient or not self._is_frozen() or not self._fits(x):
            return super().forward(x)
        cells, weight = self._in_cells(x)
        bias = self.convolution.bias
        return _frozen_convolution(cells, weight, bias) if _keeps_nothing(x) else F.conv2d(cells, weight, bias)

    def _fits(self, x: Tensor) -> bool:
        """Whether torch's own would take x: otherwise it is left to say what is wrong."""
        conv = self.convolution
        if x.dim() != 4 or x.shape[1] != conv.in_channels:
            return False
        return all(size + 2 * padding >= kernel for size, padding, kernel in zip(x.shape[2:], conv.padding, conv.kernel_size))

    def _in_cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The images [N, C, H, W] and the weight [O, C, h, w] with cells' pixels for channels."""
        conv = self.convolution
        stride, (above, beside), taps = conv.stride[0], conv.padding, _taps(conv)
        more_channels = _more_channels(x, stride)
        # The last cells end where the last output's do: beyond the images, or before rows that no output takes.
        below, right = (
            stride * ((size + 2 * padding - kernel) // stride + reach) - size - padding
            for size, padding, kernel, reach in zip(x.shape[2:], conv.padding, conv.kernel_size, taps)
        )
        layout = torch.contiguous_format
        if _is_channels_last(x) or _is_channels_last(conv.weight):  # then torch's own result is
            layout = torch.channels_last
        cells = _cells(F.pad(x, (beside, right, above, below, 0, more_channels)), stride, layout)
        return cells, _weight_in_cells(conv, more_channels).contiguous(memory_format=layout)

    def extra_repr(self) -> str:
        stride = self.convolution.stride[0]
        return f"over cells of {stride}×{stride} pixels where images ask for a gradient; {super().extra_repr()}"


def _more_channels(x: Tensor, stride: int) -> int:
    """Of zeros, so that the cells' channels fill tensor cores: 16 in place of 12 of three channels and stride 2."""
    if not x.is_cuda or _computed_dtype(x) not in (torch.bfloat16, torch.float16):
        return 0
    return -x.shape[1] % max(1, TENSOR_CORE_CHANNELS // stride**2)


def _cells(x: Tensor, stride: int, layout: torch.memory_format) -> Tensor:
    """x [N, C, H, W] as [N, s·s·C, H/s, W/s], copied once."""
    n, c, h, w = x.shape
    if layout == torch.contiguous_format:
        split = x.reshape(n, c, h // stride, stride, w // stride, stride)
        return split.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // stride, w // stride)
    split = x.permute(0, 2, 3, 1).reshape(n, h // stride, stride, w // stride, stride, c)
    return split.permute(0, 1, 3, 2, 4, 5).reshape(n, h // stride, w // stride, -1).permute(0, 3, 1, 2)


def _weight_in_cells(conv: nn.Conv2d, more_channels: int) -> Tensor:
    """[O, s·s·(C + more), ⌈h/s⌉, ⌈w/s⌉]"""
    stride, (high, wide), weight = conv.stride[0], _taps(conv), conv.weight
    missing = high * stride - weight.shape[2], wide * stride - weight.shape[3]
    filled = F.pad(weight, (0, missing[1], 0, missing[0], 0, more_channels))
    split = filled.reshape(*filled.shape[:2], high, stride, wide, stride)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(weight.shape[0], -1, high, wide)


def _taps(conv: nn.Conv2d) -> tuple[int, int]:
    """Cells that the kernel reaches over, in height and width."""
    high, wide = (-(-size // conv.stride[0]) for size in conv.kernel_size)
    return high, wide


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)  # of one channel strides alone tell


def _keeps_nothing(x: Tensor) -> bool:
    """Whether the operator that does is there for x, and no compiler decides in its place."""
    return backends.extension is not None and not torch.compiler.is_compiling() and (x.is_cpu or x.is_cuda)


def _frozen_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups: int = 1
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (_autocast(tensor) for tensor in (x, weight, bias))
    return torch.ops.bnfuse_cpp.frozen_convolution(x, weight, bias, stride, padding, dilation, groups)


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """In autocast's dtype, as convolutions take their arguments under it: float64 stays."""
    return tensor if tensor is None else tensor.to(_computed_dtype(tensor))


def _computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a convolution takes the tensor in."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def freeze_convolutions(body: nn.Module, memory_format: torch.memory_format) -> None:
    """Puts these into a network that is ours to change; the layers themselves stay as they are."""
    frozen: dict[nn.Module, FrozenConvolution] = {}
    for name, module in list(body.named_modules(remove_duplicate=False)):
        if not _is_plain(module):
            continue
        takes_images = gains_by_cells(module)
        if not takes_images and backends.extension is None:
            continue
        if module not in frozen:
            kind = ImageConvolution if takes_images else FrozenConvolution
            frozen[module] = kind(_in_layout(module, memory_format))
        body.set_submodule(name, frozen[module])


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer is its weight and bias and nothing else, such as a hook that makes the weight anew for each pass."""
    return (
        type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and {"weight", "bias"} <= module._parameters.keys()
    )


def gains_by_cells(module: nn.Module) -> bool:
    """Whether it is faster as an `ImageConvolution`: images enter it, with a stride that its kernel nearly is a multiple of."""
    if type(module) is not nn.Conv2d or module.in_channels > IMAGE_CHANNELS or module.groups != 1:
        return False
    if module.dilation != (1, 1) or len(set(module.stride)) != 1 or module.stride[0] == 1:
        return False
    (high, wide), (h, w) = _taps(module), module.kernel_size
    return high * wide * module.stride[0] ** 2 <= MOST_PADDING * h * w


def _in_layout(convolution: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The layer, or a copy whose weight [O, I, h, w] lies as its input does: otherwise every call would make one."""
    weight = convolution.weight
    if weight.dim() != 4 or memory_format != torch.channels_last or weight.is_contiguous(memory_format=memory_format):
        return convolution
    copied = copy.copy(convolution)
    copied._parameters = {
        **convolution._parameters,
        "weight": nn.Parameter(weight.detach().contiguous(memory_format=memory_format), requires_grad=False),
    }
    return copied
