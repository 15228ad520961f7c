"""G-VBSM's hooks: moving averages with a straight-through gradient, at BatchNorm layers and at convolutions.

A convolution has no statistics of its own. The script takes those of the real images once, in a pass over them
(``set_hook(pre=True)``, then `save`), and finds them again in the files of `save_path`.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import backends, ops
from ..averaging import MovingAverage
from ..errors import InputError
from ..files import write_atomically
from ..sites import Site
from .batchnorm import BatchNormHook, elements, norm
from .observer import Observer
from .whole_batch import Part, over_ranks


class BNFeatureHook(BatchNormHook):
    """`BatchNormHook` on the moving average of the batches' moments, whose gradient is the batch's at full weight.

    Parameters
    ----------
    module, process_group, backend : see `BatchNormHook`
    training_momentum : α; the average starts at 0 and goes on from one image batch to the next, until `average.reset()`

    Attributes
    ----------
    average : the `MovingAverage`
    """

    def __init__(
        self,
        module: nn.Module,
        training_momentum: float = 0.8,
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        self.average = MovingAverage(training_momentum, gradient="straight_through", start="zero")
        super().__init__(module, process_group=process_group, backend=backend)

    def measure(self, mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor) -> Tensor:
        return super().measure(*self.average(mean, var), target_mean, target_var)


class ConvFeatureHook:
    """The distance of a convolution's input from what it was on the real images: by channel, and by patch.

    A patch is `cells`×`cells` positions of the input, which is brought to whole patches by bilinear interpolation; its mean and
    variance run over samples, channels and positions. All four moments go through moving averages as in `BNFeatureHook`, and
    ``r_feature`` is the sum of the four norms. A random share of the calls measures nothing.

    Parameters
    ----------
    module : a Conv2d
    save_path, name : the statistics are in save_path/ConvFeatureHook/name/running.npz
    data_number : real images in the pass that takes them
    gpu : not used; the statistics follow the input
    training_momentum : α of the moving averages
    drop_rate : share of the calls whose r_feature is 0, [1]; drawn from Python's `random`
    cells : positions along a side of a patch; 16 in G-VBSM's code for ImageNet, 4 in that for CIFAR
    process_group, backend : as in `BatchNormHook`; ranks must draw the same from `random`

    Attributes
    ----------
    r_feature : scalar, float32 or float64
    load_tag : whether there were statistics to load
    running_dd_mean, running_dd_var : [C]; running_patch_mean, running_patch_var : [patches]

    Raises
    ------
    InputError : no module or no name, a module that is no Conv2d; at a forward pass: there are no statistics
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        save_path: str = "./",
        data_number: int = 50000,
        name: str | None = None,
        gpu: int = 0,
        training_momentum: float = 0.8,
        drop_rate: float = 0.4,
        *,
        cells: int = 16,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        if not isinstance(module, nn.Conv2d) or name is None:
            raise InputError(f"{type(self).__name__} needs a Conv2d and its name, got {type(module).__name__} and {name!r}")
        backends.check_name(backend)
        self.module, self.data_number, self.drop_rate = module, data_number, drop_rate
        self.process_group, self.backend = process_group, backend
        self.patches = Site(name, name, layout="cells", cells=cells)
        self.averages = [MovingAverage(training_momentum, gradient="straight_through", start="zero") for _ in range(2)]
        self.save_path = Path(save_path) / "ConvFeatureHook" / name / "running.npz"
        running = read_npz(self.save_path)
        self.load_tag = running is not None
        self.running = running or {}
        self.set_hook(pre=False)

    def __getattr__(self, name: str):
        if name.startswith("running_") and name in self.__dict__.get("running", ()):
            return self.running[name]
        raise AttributeError(f"{type(self).__name__} has no {name} yet")

    def set_hook(self, pre: bool = True) -> None:
        """Whether the next passes take statistics of real images (`pre`), or measure."""
        self.close()
        self.recording = pre
        self.hook = self.module.register_forward_hook(Observer(self.record if pre else self.see))

    def close(self) -> None:
        if "hook" in self.__dict__:
            self.hook.remove()

    def __getstate__(self) -> dict:
        """Copied and pickled without what was measured; the copy is a hook of the layer's copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("r_feature", "hook")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.set_hook(self.recording)

    def save(self) -> None:
        """Writes the statistics to where the constructor looks for them."""
        write_npz(self.save_path, self.running)

    @torch.no_grad()
    def record(self, module: nn.Module, inputs: tuple) -> None:
        share = len(inputs[0]) / self.data_number
        for name, value in named_moments(self.moments(inputs[0])).items():
            self.running[name] = self.running.get(name, 0.0) + share * value[0]

    def see(self, module: nn.Module, inputs: tuple) -> None:
        if random.random() > 1 - self.drop_rate:
            self.r_feature = inputs[0].new_zeros(1)
        else:
            self.r_feature = self.distance(self.averaged(inputs[0], self.running), self.running)

    # ---- the moments of one input, channels first, patches second ----

    def moments(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(mean, var), [1, C] and [1, patches]."""
        return [ops.group_moments(values, backend=self.backend) for values in (x, self.patches.arrange(x))]

    def averaged(self, x: Tensor, centre: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """`moments` of the whole batch, through the moving averages."""
        if not centre:
            raise InputError(
                f"there are no statistics for {self.patches.name}: run the real images through the network after "
                f"set_hook(pre=True), then save(); they are looked for in {self.save_path}"
            )
        moments = self.moments(x)
        if self.process_group is not None:
            in_patch = torch.full_like(elements(x, None), x.shape[0] * x.shape[1] * self.patches.cells**2)
            counts = elements(x, None), in_patch
            names = (("running_dd_mean", "running_dd_var"), ("running_patch_mean", "running_patch_var"))
            moments = [
                over_ranks(Part(count, *values, *(centre[name].to(x.device)[None] for name in pair)), self.process_group)
                for count, values, pair in zip(counts, moments, names)
            ]
        return [average(*values) for average, values in zip(self.averages, moments)]

    def distance(self, moments: list[tuple[Tensor, Tensor]], targets: dict[str, Tensor]) -> Tensor:
        found = named_moments(moments)
        return sum(norm(targets[name].to(value) - value) for name, value in found.items())[0]


def named_moments(moments: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Moments by the names that they have in the files, in G-VBSM's order; [1, C] and [1, patches]."""
    (dd_mean, dd_var), (patch_mean, patch_var) = moments
    return {
        "running_dd_var": dd_var,
        "running_dd_mean": dd_mean,
        "running_patch_mean": patch_mean,
        "running_patch_var": patch_var,
    }


# ---- files ----


def read_npz(path: Path) -> dict[str, Tensor] | None:
    """The arrays of a file; None where there is no file. Nothing in it is unpickled."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def write_npz(path: Path, tensors: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.cpu().numpy() for name, tensor in tensors.items()})
    write_atomically(path, buffer.getvalue())
