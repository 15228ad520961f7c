"""The network that the examples invert: a small ResNet that has just learnt scikit-learn's handwritten digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from bnfuse import freeze
from bnfuse.networks import CifarResNet

SIZE, CHANNELS, CLASSES = 8, 1, 10


def digits_teacher(epochs: int = 8, seed: int = 0) -> nn.Module:
    """ResNet-8, frozen, in eval mode, some 97 % right on the digits it learns; takes [N, 1, 8, 8] of mean 0 and variance 1."""
    torch.manual_seed(seed)
    digits, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = ((digits - digits.mean()) / digits.std()).float().view(-1, CHANNELS, SIZE, SIZE)
    teacher = CifarResNet(8, CLASSES, CHANNELS)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.005)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(teacher(images[rows]), labels[rows]).backward()
            optimizer.step()
    return freeze(teacher)
