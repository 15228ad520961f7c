"""EDC's hooks: G-VBSM's, half against the statistics of all real images and half against those of the batch's own classes.

Those of a class are the means, over its images, of each image's own mean and variance. The script takes them in a pass over
the real images (``set_hook(pre=True)``, `set_label` before each batch, then `save`) and finds them again in the files of
`save_path`. ``category_aware="local"`` takes a batch of real images instead (`set_tea`), and measures against that (`set_ori`).
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..averaging import MovingAverage
from ..errors import InputError
from . import gvbsm
from .batchnorm import BatchNormHook
from .gvbsm import named_moments, read_npz, write_npz


class _Categories:
    """The statistics of each class, and what a script tells a hook. Mixed into both hooks.

    Attributes
    ----------
    load_tag : whether there were files of classes to load; class 0 first, as many as there are
    tables : name → [K, C], float32
    """

    def _start(self, save_path: str, kind: str, name: str | None, category_aware: str) -> None:
        if name is None:
            raise InputError(f"{type(self).__name__} needs the layer's name, under which its statistics are saved")
        if category_aware not in ("global", "local"):
            raise InputError(f"category_aware must be 'global' or 'local', got {category_aware!r}")
        self.category_aware, self.category_folder, self.name = category_aware, Path(save_path) / kind, name
        self.tea_tag = self.return_tag = self.recording = False
        self.targets_of_batch, self.counts, self.local = None, None, {}
        self.tables = self._load_classes() if category_aware == "global" else {}
        self.load_tag = bool(self.tables)

    def set_label(self, targets: Tensor) -> None:
        """The classes of the next batch, [N]."""
        self.targets_of_batch = targets.long()

    def set_tea(self) -> None:
        self.tea_tag = True

    def set_ori(self) -> None:
        self.tea_tag = False

    def set_return(self) -> None:
        self.return_tag = True

    def remove_return(self) -> None:
        self.return_tag = False

    def _labels(self, device: torch.device) -> Tensor:
        if self.targets_of_batch is None:
            raise InputError("the classes of the batch are not known; call set_label(targets) before the forward pass")
        return self.targets_of_batch.to(device)

    def _record(self, values: dict[str, Tensor]) -> None:
        """Adds each image's moments [N, C] to its class."""
        labels = self._labels(next(iter(values.values())).device)
        classes = int(labels.max()) + 1
        self.counts = _add(self.counts, labels, torch.ones_like(labels, dtype=torch.float32)[:, None], classes)
        for name, value in values.items():
            self.tables[name] = _add(self.tables.get(name), labels, value, classes)

    def _category(self, like: Tensor) -> dict[str, Tensor]:
        """What the batch's classes have on average, name → [C]."""
        if self.category_aware == "local":
            found, how = self.local, "run real images through the network between set_tea() and set_ori()"
        else:
            found, how = self.tables, f"record and save() them; they are looked for in {self.category_folder}"
        if not found:
            raise InputError(f"there are no statistics of classes for {self.name}: {how}")
        if self.category_aware == "local":
            return found
        labels = self._labels(like.device)
        return {name: table.to(like)[labels].mean(0) for name, table in found.items()}

    def _path(self, k: int) -> Path:
        return self.category_folder / f"class_{k}" / self.name / "running.npz"

    def _load_classes(self) -> dict[str, Tensor]:
        rows = []
        while (found := read_npz(self._path(len(rows)))) is not None:
            rows.append(found)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _save_classes(self, renamed: dict[str, str]) -> None:
        if self.counts is None:
            raise InputError("nothing has been recorded: run the real images through the network after set_hook(pre=True)")
        means = {renamed.get(name, name): table / self.counts for name, table in self.tables.items()}
        for k in range(len(self.counts)):
            write_npz(self._path(k), {name: table[k] for name, table in means.items()})
        self.tables, self.counts = means, None  # as they will be found in the files


class BNFeatureHook(_Categories, BatchNormHook):
    """Half the distance from the running statistics and half that from the classes', of a moving average.

    Parameters
    ----------
    module, process_group, backend : see `BatchNormHook`
    save_path, name : the statistics are in save_path/BNFeatureHook/class_K/name/running.npz
    training_momentum : α, see `gvbsm.BNFeatureHook`
    gpu, flatness_weight : not used
    category_aware : "global" or "local", see above

    Raises
    ------
    InputError : no name; at a forward pass: no statistics, or no labels
    """

    def __init__(
        self,
        module: nn.Module,
        save_path: str = "./",
        training_momentum: float = 0.4,
        name: str | None = None,
        gpu: int = 0,
        flatness_weight: float = 0,
        category_aware: str = "global",
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        self.average = MovingAverage(training_momentum, gradient="straight_through", start="zero")
        self._start(save_path, "BNFeatureHook", name, category_aware)
        super().__init__(module, process_group=process_group, backend=backend)

    def set_hook(self, pre: bool = True) -> None:
        """Whether the next passes take statistics of real images (`pre`), or measure."""
        self.recording = pre
        if pre:
            self.tables, self.counts = {}, None

    def save(self) -> None:
        """Writes the statistics to where the constructor looks for them."""
        self._save_classes({})

    def groups(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (torch.arange(len(x) + 1, device=x.device), None) if self.recording else (None, None)

    def take(self, module, x: Tensor, mean: Tensor, var: Tensor, *groups) -> None:
        if self.recording:
            self._record({"running_dd_var": var.detach(), "running_dd_mean": mean.detach()})
        elif self.category_aware == "local" and self.tea_tag and not self.return_tag:
            self.local = {"running_dd_var": var[0].detach(), "running_dd_mean": mean[0].detach()}
        elif not self.return_tag:
            super().take(module, x, mean, var, *groups)

    def measure(self, mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor) -> Tensor:
        mean, var = self.average(mean, var)
        category = self._category(mean)
        by_class = super().measure(mean, var, category["running_dd_mean"][None], category["running_dd_var"][None])
        return 0.5 * super().measure(mean, var, target_mean, target_var) + 0.5 * by_class


class ConvFeatureHook(_Categories, gvbsm.ConvFeatureHook):
    """`gvbsm.ConvFeatureHook`, half against the statistics of all images and half against the classes'.

    Parameters
    ----------
    module, save_path, data_number, name, gpu, training_momentum, drop_rate, cells, process_group, backend : see there
    flatness_weight : not used
    category_aware : "global" or "local", see above
    swapped : EDC's code writes the patches' means of a class where their variances belong, and reads them so; False does not

    Raises
    ------
    InputError : as there; at a forward pass: no statistics of classes, or no labels
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        save_path: str = "./",
        data_number: int = 50000,
        name: str | None = None,
        gpu: int = 0,
        training_momentum: float = 0.4,
        drop_rate: float = 0.4,
        flatness_weight: float = 0,
        category_aware: str = "global",
        *,
        cells: int = 16,
        swapped: bool = True,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        self.swapped = swapped
        self._start(save_path, "ConvFeatureHook", name, category_aware)
        options = dict(cells=cells, process_group=process_group, backend=backend)
        classes = self.load_tag
        super().__init__(module, save_path, data_number, name, gpu, training_momentum, drop_rate, **options)
        self.load_tag = self.load_tag and (classes or category_aware == "local")

    def save(self) -> None:
        """Writes the statistics to where the constructor looks for them."""
        super().save()
        if self.category_aware == "global":
            other = {"running_patch_mean": "running_patch_var", "running_patch_var": "running_patch_mean"}
            self._save_classes(other if self.swapped else {})

    @torch.no_grad()
    def record(self, module: nn.Module, inputs: tuple) -> None:
        super().record(module, inputs)
        if self.category_aware == "global":
            x = inputs[0]
            samples = torch.arange(len(x) + 1, device=x.device)
            values = (x, self.patches.arrange(x))
            self._record(named_moments([ops.group_moments(v, samples, backend=self.backend) for v in values]))

    def see(self, module: nn.Module, inputs: tuple) -> None:
        if self.return_tag:
            return
        if self.category_aware == "local" and self.tea_tag:
            self.local = {name: value[0].detach() for name, value in named_moments(self.moments(inputs[0])).items()}
        elif random.random() > 1 - self.drop_rate:
            self.r_feature = inputs[0].new_zeros(1)
        else:
            averaged = self.averaged(inputs[0], self.running)
            by_class = self.distance(averaged, self._category(averaged[0][0]))
            self.r_feature = 0.5 * self.distance(averaged, self.running) + 0.5 * by_class


def _add(table: Tensor | None, labels: Tensor, values: Tensor, classes: int) -> Tensor:
    """The table [K, C] with values [N, C] added to the rows of their labels, K at least `classes`."""
    if table is None:
        table = values.new_zeros(0, values.shape[1])
    if len(table) < classes:
        table = torch.cat([table, table.new_zeros(classes - len(table), table.shape[1])])
    return table.index_add(0, labels, values)
