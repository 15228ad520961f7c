"""Small networks with every chain that fusion knows, and some that it must leave alone."""

import torch
import torch.nn.functional as F
from torch import nn

from bnfuse import freeze


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm layer running statistics and affine parameters of its own, and freezes the network."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 1.5, generator=generator)
                layer.bias.data.normal_(0, 0.3, generator=generator)
    return freeze(model)


class Chains(nn.Module):
    """Conv-BN-act, residual additions in three spellings, two BN branches added, a BN used twice, and no affine part."""

    def __init__(self, width: int = 6, classes: int = 5):
        super().__init__()
        conv = lambda c_in: nn.Conv2d(c_in, width, 3, padding=1, bias=False)  # noqa: E731
        self.stem, self.bn0, self.act0 = conv(3), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)
        self.conv1, self.bn1 = conv(width), nn.BatchNorm2d(width)
        self.conv2, self.bn2, self.drop = conv(width), nn.BatchNorm2d(width, affine=False), nn.Dropout(0.5)
        self.conv3, self.bn3 = conv(width), nn.BatchNorm2d(width, eps=1e-2)
        self.skip, self.bn_skip = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv4, self.bn4 = conv(width), nn.BatchNorm2d(width)
        self.head, self.bn_head = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.act0(self.bn0(self.stem(x)))
        x = F.relu(self.drop(self.bn1(self.conv1(x))) + x)
        out = self.bn2(self.conv2(x))
        out += x
        x = F.relu6(out)
        x = torch.relu(self.bn_skip(self.skip(x)) + self.bn3(self.conv3(x)))
        y = self.bn4(self.conv4(x))
        x = F.silu(y) + y  # y is used twice: only the BatchNorm can be fused
        x = F.hardswish(self.bn_head(self.head(x.mean((2, 3)))))
        return self.fc(x)


class Untraceable(nn.Module):
    """Its control flow depends on the data, so torch.fx cannot follow it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.bn(self.conv(x))
        if x.sum() > 0:
            x = x * 2
        return self.fc(F.relu(x).mean((2, 3)))


class Shared(nn.Module):
    """One BatchNorm layer that runs twice in a pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x)))))).mean((2, 3)))


class Viewing(nn.Module):
    """It takes positions and channels together by `view`, which contiguous activations alone allow, and reads bits by one."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * size * size, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        logits = self.fc(x.view(x.size(0), -1))
        return logits + logits.detach().view(torch.int32).sign()
