"""The networks that bnfuse brings: the CIFAR ResNets, and the ConvNet of dataset distillation. `models` builds them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError


class CifarResNet(nn.Module):
    """ResNet for small images: He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2.

    Three stages of n blocks at widths (w, 2w, 4w), global average pooling, one linear layer; depth 6n + 2. The state
    dict has the keys of akamaster/pytorch_resnet_cifar10, whose checkpoints load.

    Parameters
    ----------
    depth : 6n + 2: 8, 20, 32, 44, 56, 110 …
    num_classes : logits a sample
    in_channels : channels of the input
    width : channels of the first stage; 16 in the paper

    Raises
    ------
    InputError
        The depth is not 6n + 2 with n ≥ 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"the depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, …), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(blocks, width, width, stride=1)
        self.layer2 = self._stage(blocks, width, 2 * width, stride=2)
        self.layer3 = self._stage(blocks, 2 * width, 4 * width, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialize(self)

    @staticmethod
    def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] → logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al. 2015, section 4.2).

    [N, in_channels, H, W] → [N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + x)


class ConvNet(nn.Module):
    """The plain network of dataset distillation (Gidaris and Komodakis 2018; Zhao et al., arXiv 2006.05929), with BN.

    Blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 average pooling. Theirs flattens what is left at 32x32; here
    global average pooling takes any size from 2^depth pixels on.

    Parameters
    ----------
    num_classes : logits a sample
    in_channels : channels of the input
    width : channels of every block
    depth : number of blocks
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 128, depth: int = 3):
        super().__init__()
        self.blocks = nn.Sequential(*(self._block(width if i else in_channels, width) for i in range(depth)))
        self.linear = nn.Linear(width, num_classes)
        _initialize(self)

    @staticmethod
    def _block(in_channels: int, out_channels: int) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] → logits [N, num_classes]."""
        return self.linear(self.blocks(x).mean((2, 3)))


def _initialize(model: nn.Module) -> None:
    """He et al. (arXiv 1502.01852): normal with variance 2 / fan_in, before a ReLU."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
