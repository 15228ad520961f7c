"""The Triton kernels of the operators in `bnfuse.ops`: each function has the contract of its namesake there or in
`bnfuse.reference`.

    boundary.py     checks of what comes in, and the launch
    tuning.py       how the work is cut
    tiles.py activations.py distances.py    what kernels do with a tile
    forward.py backward.py loss.py          the kernels, each with its launcher

They take CUDA tensors; CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported. No launch waits for the
device (measuring tiles does, see tuning.py), reads a value on the host or uploads one, so that a CUDA graph may capture any of
them, once they are compiled: run a step before the capture. The interpreter cuts values to bfloat16, where a GPU rounds them to
the nearest.
"""

from .backward import bn_backward, bn_backward_, group_moments_backward
from .forward import bn_forward, bn_forward_with_targets, group_moments
from .loss import bn_loss
from .tuning import Config, pinned

__all__ = [
    "Config",
    "bn_backward",
    "bn_backward_",
    "bn_forward",
    "bn_forward_with_targets",
    "bn_loss",
    "group_moments",
    "group_moments_backward",
    "pinned",
]
