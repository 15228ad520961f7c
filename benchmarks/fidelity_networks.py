"""Students that bnfuse does not bring, as a user names a network of his own: `--model fidelity_networks.py:wide_resnet20`."""

from __future__ import annotations

from torch import nn

from bnfuse.networks import CifarResNet


def wide_resnet20() -> nn.Module:
    """CIFAR's ResNet-20 with twice the channels: [N, 3, H, W] → [N, 10]."""
    return CifarResNet(20, width=32)


def resnet18() -> nn.Module:
    """ImageNet's ResNet-18 as it is used for images of 32×32, with a stem that does not shrink them: [N, 3, H, W] → [N, 10]."""
    from torchvision.models import resnet18 as of_torchvision

    model = of_torchvision(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
