"""Images from a teacher's BatchNorm statistics, in the way of SRe2L (arXiv 2306.13092): cross-entropy and statistics.

python examples/recover_sre2l.py            # with the eager hook
python examples/recover_sre2l_bnfuse.py     # the same script but for one import
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from eager_hooks import BNFeatureHook
from teacher import CHANNELS, CLASSES, SIZE, digits_teacher
from torch import nn


def recover(teacher, labels, shape, iterations, lr=0.25, r_bn=0.01, first_bn_multiplier=10.0, jitter=4, seed=0):
    """Images of these labels, and the loss of each iteration. `shape` is [C, H, W]."""
    torch.manual_seed(seed)
    hooks = [BNFeatureHook(layer) for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = [first_bn_multiplier, *[1.0] * (len(hooks) - 1)]
    images = torch.randn(len(labels), *shape, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=lr, betas=(0.5, 0.9))
    losses = []
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
        classification = F.cross_entropy(teacher(random_view(images, jitter)), labels)
        statistics = sum(weight * hook.r_feature for weight, hook in zip(weights, hooks))
        loss = classification + r_bn * statistics
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for hook in hooks:
        hook.close()
    return images.detach(), losses


def random_view(images, jitter):
    """A crop of the images brought to their size, a shift and a flip; one draw for the batch."""
    height, width = images.shape[-2:]
    area = 0.08 + 0.92 * torch.rand(()).item()
    h, w = (max(1, round(length * area**0.5)) for length in (height, width))
    top, left = (int(torch.randint(free + 1, ())) for free in (height - h, width - w))
    images = images[..., top : top + h, left : left + w]
    images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    shifts = torch.randint(-jitter, jitter + 1, (2,)).tolist()
    images = torch.roll(images, shifts, (2, 3))
    return images.flip(3) if torch.rand(()) < 0.5 else images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100)
    args = parser.parse_args()
    teacher, labels = digits_teacher(), torch.arange(args.batch) % CLASSES
    started = time.perf_counter()
    images, losses = recover(teacher, labels, (CHANNELS, SIZE, SIZE), args.iterations, jitter=1)
    seconds = time.perf_counter() - started
    right = (teacher(images).argmax(1) == labels).float().mean()
    print(f"loss {losses[0]:.6f} → {losses[-1]:.6f}, {right:.0%} recognised, {seconds / args.iterations * 1e3:.1f} ms a step")


if __name__ == "__main__":
    main()
