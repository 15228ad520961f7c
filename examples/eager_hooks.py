"""What a script's own hooks do, in plain PyTorch: the side that bnfuse.compat is compared with."""

import torch


class BNFeatureHook:
    """The distance of a BatchNorm layer's input from its running statistics, found beside the layer's own forward."""

    def __init__(self, module):
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module, inputs, output):
        x = inputs[0]  # [N, C, H, W]
        mean = x.mean([0, 2, 3])
        rows = x.permute(1, 0, 2, 3).contiguous().reshape(x.shape[1], -1)  # [C, N·H·W]
        var = rows.var(1, unbiased=False)
        self.r_feature = torch.norm(module.running_var - var, 2) + torch.norm(module.running_mean - mean, 2)

    def close(self):
        self.hook.remove()


class DeepInversionFeatureHook(BNFeatureHook):
    """The same, under its first name."""
