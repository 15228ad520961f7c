"""A network turned inside out in the way of DeepInversion (arXiv 1912.08795): half size first, image priors, statistics.

python examples/invert_deepinversion.py            # with the eager hook
python examples/invert_deepinversion_bnfuse.py     # the same script but for one import
"""

import argparse
import time

import torch
import torch.nn.functional as F
from bnfuse.compat import DeepInversionFeatureHook
from teacher import CHANNELS, CLASSES, SIZE, digits_teacher
from torch import nn


def invert(net, targets, shape, iterations, lr=0.2, main=1.0, bn=0.05, tv=1e-4, l2=1e-5, first_bn=10.0, jitter=30, seed=0):
    """Images of these targets, and the loss of each iteration; the first third is at half size. `shape` is [C, H, W]."""
    torch.manual_seed(seed)
    hooks = [DeepInversionFeatureHook(layer) for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = [first_bn, *[1.0] * (len(hooks) - 1)]
    images = torch.randn(len(targets), *shape, requires_grad=True)
    losses = []
    for scale, steps in ((2, iterations // 3), (1, iterations - iterations // 3)):
        optimizer = torch.optim.Adam([images], lr=lr, betas=(0.5, 0.9))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(steps):
            view = F.avg_pool2d(images, scale) if scale > 1 else images
            view = view.roll(torch.randint(-(jitter // scale), jitter // scale + 1, (2,)).tolist(), (2, 3))
            view = view.flip(3) if torch.rand(()) < 0.5 else view
            classification = F.cross_entropy(net(view), targets)
            statistics = sum(weight * hook.r_feature for weight, hook in zip(weights, hooks))
            loss = main * classification + bn * statistics + tv * total_variation(view) + l2 * view.norm()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    for hook in hooks:
        hook.close()
    return images.detach(), losses


def total_variation(x):
    """The norms of the differences to the neighbours in four directions."""
    right, down = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    falling, rising = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
    return sum(torch.norm(difference) for difference in (right, down, falling, rising))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--batch", type=int, default=100)
    args = parser.parse_args()
    net, targets = digits_teacher(), torch.arange(args.batch) % CLASSES
    started = time.perf_counter()
    images, losses = invert(net, targets, (CHANNELS, SIZE, SIZE), args.iterations, jitter=1)
    seconds = time.perf_counter() - started
    right = (net(images).argmax(1) == targets).float().mean()
    print(f"loss {losses[0]:.6f} → {losses[-1]:.6f}, {right:.0%} recognised, {seconds / args.iterations * 1e3:.1f} ms a step")


if __name__ == "__main__":
    main()
