"""A network turned inside out in the way of DeepInversion (arXiv 1912.08795): half size first, image priors, statistics.

python examples/invert_deepinversion.py            # with the eager hook
python examples/invert_deepinversion_bnfuse.py     # the same script but for one import
"""

import argparse
import time

import torch
import torch.nn.functional as F
from eager_hooks import DeepInversionFeatureHook
from teacher import CHANNELS, CLASSES, SIZE, digits_teacher
from torch import nn


def invert(net, targets, shape, iterations, lr=0.2, main=1.0, bn=0.05, tv=1e-4, l2=1e-5, first_bn=10.0, jitter=30, seed=0):
    """Images of these targets, and the loss of each iteration; the first third is at half size. `shape` is [C, H, W]."""
    torch.manual_seed(seed)
    loss_r_feature_layers = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            loss_r_feature_layers.append(DeepInversionFeatureHook(module))
    inputs = torch.randn(len(targets), *shape, requires_grad=True)
    losses = []
    for pooled, its in ((2, iterations // 3), (1, iterations - iterations // 3)):
        optimizer = torch.optim.Adam([inputs], lr=lr, betas=(0.5, 0.9), eps=1e-8)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, its))
        for _ in range(its):
            small = F.avg_pool2d(inputs, pooled) if pooled > 1 else inputs
            off1, off2 = torch.randint(-(jitter // pooled), jitter // pooled + 1, (2,)).tolist()
            jittered = torch.roll(small, shifts=(off1, off2), dims=(2, 3))
            if torch.rand(()) > 0.5:
                jittered = torch.flip(jittered, dims=(3,))
            optimizer.zero_grad()
            outputs = net(jittered)
            loss_ce = F.cross_entropy(outputs, targets)
            rescale = [first_bn] + [1.0 for _ in range(len(loss_r_feature_layers) - 1)]
            loss_bn = sum(mod.r_feature * rescale[idx] for idx, mod in enumerate(loss_r_feature_layers))
            loss = main * loss_ce + bn * loss_bn + tv * total_variation(jittered) + l2 * torch.norm(jittered)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    for layer in loss_r_feature_layers:
        layer.close()
    return inputs.detach(), losses


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
