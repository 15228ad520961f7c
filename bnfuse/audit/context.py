"""What every measure is handed: the images of each arm, the teacher, the budget, seeds, and folders to write to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..class_names import misplaced
from ..datasets import ArrayDataset, ImageDataset
from ..errors import InputError
from ..files import atomic_path, write_atomically
from ..models import Teacher
from ..seeds import derive_seed
from ..statistics import ClassStatistics
from .findings import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("original", "synthetic", "noised")
BUDGETS = ("quick", "standard", "full")
NOISE = 0.2  # standard deviation of the noise of the noised originals, of pixels in [0, 1]


@dataclass(frozen=True)
class Context:
    """One audit, as a measure sees it.

    All images are of one size and number of channels, which are the teacher's where there is one; labels mean the same classes
    in every dataset. Every dataset is in memory: ``images`` uint8 [N, H, W, C], ``labels`` int64 [N].

    Attributes
    ----------
    private, synthetic, noised : the images of the arms; `noised` are the private ones plus Gaussian noise, clipped
    heldout : real images that the synthetic ones were not made from, or None
    noise : standard deviation of that noise, of pixels in [0, 1]
    teacher : on `device`, or None
    statistics : recorded with that teacher, or None
    budget : of `BUDGETS`
    device : where networks run
    seed : of everything random, see `rng`
    out : the audit's folder
    key : hex digest of all that the findings depend on, see `measure.inputs_key`; a measure's own includes its config
    show_progress : whether bars are shown
    """

    private: ArrayDataset
    synthetic: ArrayDataset
    noised: ArrayDataset
    heldout: ArrayDataset | None
    noise: float
    teacher: Teacher | None
    statistics: ClassStatistics | None
    budget: str
    device: torch.device
    seed: int
    out: Path
    key: str = ""
    show_progress: bool = False

    @property
    def num_classes(self) -> int:
        return self.private.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.private.image_shape

    def images(self, arm: str) -> ArrayDataset:
        """The images of an arm, one of `ARMS`."""
        return {"original": self.private, "synthetic": self.synthetic, "noised": self.noised}[arm]

    def seed_for(self, *words: int | str) -> int:
        """A seed for what `words` name, say ("gradients", arm, trial): the same in every run of this audit."""
        return derive_seed(self.seed, "audit", *words)

    def rng(self, *words: int | str) -> torch.Generator:
        """A generator on the CPU, seeded with `seed_for`."""
        return torch.Generator().manual_seed(self.seed_for(*words))

    def progress(self, name: str, total: int, unit: str = "it") -> tqdm:
        """A bar for `total` steps; call its `update`, and leave it by `with`."""
        return tqdm(total=total, desc=name, unit=unit, leave=False, disable=None if self.show_progress else True)

    def scratch(self, name: str) -> Path:
        """A folder for the parts of a long measure, which another run finds again if its inputs are the same.

        Parts that are tensors go through `kept`; write any other atomically (`files.write_atomically`), so that a killed run
        leaves none that is torn.
        """
        folder = self.out / "scratch" / f"{name}-{self.key[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def kept(self, measure: str, part: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A part of a long measure: made now and kept in its `scratch` folder, or found there from an earlier run.

        Parameters
        ----------
        measure, part : name the file, which is there whole or not at all
        make : called where there is no such file; its tensors are contiguous

        Returns
        -------
        what `make` returned, read from the file either way, so on the CPU
        """
        path = self.scratch(measure) / f"{part.replace(' ', '-')}.safetensors"
        if not path.exists():
            write_atomically(path, safetensors.torch.save(make()))
        return safetensors.torch.load_file(path)

    def picture(
        self, name: str, picture: Image.Image | Figure, caption: str, public: Image.Image | Figure | None = None
    ) -> Picture:
        """Writes pictures/NAME.png, and NAME-public.png where the picture for everybody is another.

        Parameters
        ----------
        name : begins with the measure's
        picture : Pillow's or a matplotlib figure
        caption : what is to be seen
        public : the picture without private images: `picture` itself if it shows none, None if nothing would be left
        """
        path = self._write_picture(name, picture)
        if public is None or public is picture:
            return Picture(path, caption, None if public is None else path)
        return Picture(path, caption, self._write_picture(f"{name}-public", public))

    def plot(self, name: str, plot: Figure, caption: str) -> Picture:
        """`picture` of figures alone, which everybody may see."""
        return self.picture(name, plot, caption, public=plot)

    def _write_picture(self, name: str, picture: Image.Image | Figure) -> str:
        path = Path("pictures") / f"{name}.png"
        with atomic_path(self.out / path) as part:
            if isinstance(picture, Image.Image):
                picture.save(part, format="PNG")
            else:
                picture.savefig(part, format="png", dpi=150, bbox_inches="tight")
        return path.as_posix()


def prepare(
    private: ImageDataset,
    synthetic: ImageDataset,
    heldout: ImageDataset | None,
    *,
    noise: float,
    teacher: Teacher | None,
    statistics: ClassStatistics | None,
    budget: str,
    device: torch.device,
    seed: int,
    out: Path,
    show_progress: bool,
) -> Context:
    """Checks that everything fits together and decodes every image.

    Raises
    ------
    InputError
        A dataset is empty, or of another size, number of channels or classes than the private one; the teacher takes other
        images; the statistics are another teacher's; held-out images are among the private ones; an unknown budget; the noise
        is not positive.
    """
    if budget not in BUDGETS:
        raise InputError(f"budget is {budget!r}, expected one of {', '.join(BUDGETS)}")
    if not 0 < noise <= 1:
        raise InputError(f"noise is the standard deviation for pixels in [0, 1], expected 0 < noise <= 1, got {noise}")
    if not len(private):
        raise InputError(f"the private dataset {private.name} has no image")
    others = {"synthetic": synthetic, "held-out": heldout}
    fitted = {role: _fitting(private, role, data) for role, data in others.items() if data is not None}
    if teacher is not None:
        _check_teacher(teacher, statistics, private)
        teacher.model.to(device)
    elif statistics is not None:
        raise InputError("statistics are read with the teacher that they were recorded with: give it too (teacher, --teacher)")
    private = private.in_memory()
    if "held-out" in fitted:
        _check_apart(private, fitted["held-out"])
    return Context(
        private=private,
        synthetic=fitted["synthetic"],
        noised=_noised(private, noise, seed),
        heldout=fitted.get("held-out"),
        noise=noise,
        teacher=teacher,
        statistics=statistics,
        budget=budget,
        device=device,
        seed=seed,
        out=out,
        show_progress=show_progress,
    )


def _fitting(private: ImageDataset, role: str, data: ImageDataset) -> ArrayDataset:
    """The dataset in memory, its labels numbered as the private one's. InputError where it cannot be compared with that."""
    who = f"the {role} dataset {data.name}"
    if not len(data):
        raise InputError(f"{who} has no image")
    if data.image_shape != private.image_shape:
        raise InputError(
            f"{who} has images of {_shape(data)}, the private dataset {private.name} of {_shape(private)}, and they are "
            "compared pixel by pixel: load them with one image_size and channels (--image-size, and --mean and --std for the "
            "channels)"
        )
    if data.num_classes != private.num_classes:
        raise InputError(
            f"{who} has {data.num_classes} classes, the private dataset {private.name} {private.num_classes}: expected "
            "the same classes, in folders of the same names"
        )
    if data.class_names != private.class_names and sorted(data.class_names) == sorted(private.class_names):
        data = data.with_classes(private.class_names)
    if (found := misplaced(data.class_names, private.class_names)) is not None:
        raise InputError(
            f"class {found[0]} of {who} is {data.class_names[found[0]]!r}, which is class {found[1]} of the private dataset "
            f"{private.name}, and other classes are not the same: expected the same classes, in folders of the same names"
        )
    return data.in_memory()


def _shape(data: ImageDataset) -> str:
    channels, height, width = data.image_shape
    return f"{height}x{width} pixels and {channels} channel{'s' if channels > 1 else ''}"


def _check_apart(private: ArrayDataset, heldout: ArrayDataset) -> None:
    """InputError where a tenth of the held-out images are private ones: then they are no baseline. Datasets have some twice."""
    seen = {image.tobytes() for image in private.images.numpy()}
    both = sum(image.tobytes() in seen for image in heldout.images.numpy())
    if both > len(heldout) / 10:
        raise InputError(
            f"{both} of the {len(heldout)} images of the held-out dataset {heldout.name} are among the private ones of "
            f"{private.name}: expected real images that the synthetic ones were not made from"
        )


def _check_teacher(teacher: Teacher, statistics: ClassStatistics | None, private: ImageDataset) -> None:
    expected = (teacher.preprocessing.channels, *teacher.preprocessing.image_size)
    if private.image_shape != expected:
        channels, height, width = expected
        raise InputError(
            f"the teacher {teacher.architecture} takes images of {height}x{width} pixels and {channels} channels, the private "
            f"dataset {private.name} has {_shape(private)}: load every dataset with the teacher's image_size and channels"
        )
    if statistics is None:
        return
    statistics.check(teacher=teacher.fingerprint, num_classes=private.num_classes, preprocessing=teacher.preprocessing)


def _noised(data: ArrayDataset, noise: float, seed: int) -> ArrayDataset:
    """The images plus Gaussian noise, rounded and clipped to 0..255."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "audit", "noised"))
    images = torch.empty_like(data.images)  # uint8 [N, H, W, C]
    for start in range(0, len(data), 4096):  # a part at a time: float32 takes four times the memory
        part = data.images[start : start + 4096].float()
        part += torch.randn(part.shape, generator=rng) * (255 * noise)
        images[start : start + 4096] = part.round_().clamp_(0, 255).to(torch.uint8)
    return ArrayDataset(images, data.labels, data.class_names, name=f"{data.name}, noised")
