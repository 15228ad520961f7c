"""The settings that this package ships for three kinds of images: a synthesis's, and those of the student that learns from it.

A recipe is no more than default values of `SynthesisConfig`, `RelabelConfig` and `TrainConfig`:
`recipe("cifar10").synthesis_config(seed=1)`, or `bnfuse synthesize --recipe cifar10`, then `relabel` and `train`: flags win
over it. Other projects' settings are in `presets`. docs/recipes.md shows what students come to with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .configs import flags
from .errors import InputError
from .plans import SynthesisConfig
from .relabelling import RelabelConfig
from .training import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """Settings that go together.

    Attributes
    ----------
    name : its key in `RECIPES`
    purpose : the images that it is for, and what its figures are of
    synthesis : fields of `SynthesisConfig`; those not named have its defaults
    training : the same of `TrainConfig`, for a student
    soft_labels : the synthesis stores the teacher's logits of each image, and unless `views` says otherwise the student learns
        them
    views : the student learns the teacher's logits of so many augmented views of each image, which `relabel` writes; 0 for none
    more_teachers : models of further teachers, which learn the private images too (`bnfuse train`); without them the settings
        still go together, and are worth less. docs/recipes.md has the commands
    teacher_training : fields of `TrainConfig` for those, but for the model
    """

    name: str
    purpose: str
    synthesis: dict[str, object]
    training: dict[str, object]
    soft_labels: bool
    views: int = 0
    more_teachers: tuple[str, ...] = ()
    teacher_training: dict[str, object] = field(default_factory=dict)

    @property
    def labels(self) -> str:
        """What the student learns, as ``bnfuse train --labels`` has it: "relabel", "soft" or "hard"."""
        return "relabel" if self.views else "soft" if self.soft_labels else "hard"

    def synthesis_config(self, **changes) -> SynthesisConfig:
        """With other values for some fields; InputError where they do not go with the rest."""
        return SynthesisConfig(**{**self.synthesis, "soft_labels": self.soft_labels, **changes, "recipe": self.name})

    def relabel_config(self, **changes) -> RelabelConfig:
        """Views as the student's augmentation makes them, with other values for some fields.

        Raises
        ------
        InputError : the recipe's student learns no views; or the values do not go together
        """
        if not self.views:
            raise InputError(f"the students of the recipe {self.name} learn {self.labels} labels: it has nothing to relabel")
        return RelabelConfig(**{**self._views(), **changes})

    def _views(self) -> dict[str, object]:
        augmentation = {name: self.training[name] for name in ("batch_size", "crop_scale", "flip")}
        return {"views": self.views, **augmentation}

    def train_config(self, **changes) -> TrainConfig:
        """A student's, with other values for some fields; InputError where they do not go with the rest."""
        return TrainConfig(**{**self.training, **changes, "recipe": self.name})


_AS_PHOTOGRAPHS = {"noise_exponent": 1.0, "step_exponent": 1.0, "chroma_scale": 0.3}  # of noise and steps, see `spectrum`
_STUDENT = {"epochs": 150, "batch_size": 32, "lr": 0.003, "shift": 0, "flip": True, "crop_scale": 0.2}

RECIPES: dict[str, Recipe] = {
    each.name: each
    for each in (
        Recipe(
            "digits",
            "grey images of 8×8 pixels: the demo's handwritten digits",
            {"images_per_class": 100, "batch_size": 100, "iterations": 300, "first_site_weight": 10.0},
            {
                "model": "resnet20",
                "epochs": 30,
                "batch_size": 64,
                "lr": 0.01,
                "shift": 0,
                "flip": False,
                "crop_scale": 0.6,
                "label_smoothing": 0.1,
            },
            soft_labels=False,
            views=30,
        ),
        Recipe(
            "cifar10",
            "colour images of 32×32 pixels: CIFAR-10, a ResNet-20 as teacher, in turn with a plain network and a "
            "ResNet-8 (`--more-teachers`); a ResNet-20 as student",
            {
                "images_per_class": 50,
                "batch_size": 50,
                "low_resolution_iterations": 200,
                "iterations": 400,
                "ce_weight": 0.3,
                "first_site_weight": 10.0,
                "tv_weight": 1.0,
                "jitter": 2,
                "flip": True,
                **_AS_PHOTOGRAPHS,
                "teacher_plan": "in_turn",
            },
            {"model": "resnet20", **_STUDENT},
            soft_labels=True,
            views=100,
            more_teachers=("convnet3", "resnet8"),
            teacher_training={"epochs": 15, "batch_size": 64, "lr": 0.003, "shift": 2, "flip": True},
        ),
        Recipe(
            "imagenet",
            "photographs of 224×224 pixels: ten classes of ImageNet, a MobileNetV1 ×0.25 as teacher; the student is a "
            "ResNet-20 that sees them at 64×64 (`--image-size 64`)",
            {
                "images_per_class": 20,
                "batch_size": 20,
                "iterations": 200,
                "lr": 0.2,
                "bn_weight": 0.01,
                "first_site_weight": 1.0,
                "tv_weight": 0.1,
                "jitter": 32,
                "flip": True,
                **_AS_PHOTOGRAPHS,
            },
            {"model": "resnet20", **_STUDENT, "batch_size": 20},
            soft_labels=True,
            views=100,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """InputError, naming those that there are, where there is none of this name."""
    if name not in RECIPES:
        raise InputError(f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def settings(name: str) -> dict[str, str]:
    """A recipe's flags of each bnfuse command that it has settings for, in their order."""
    chosen = RECIPES[name]
    labels = "" if chosen.labels == "hard" else f" --labels {chosen.labels}"
    return {
        "synthesize": flags(chosen.synthesis | ({"soft_labels": True} if chosen.soft_labels else {})),
        **({"relabel": flags(chosen._views())} if chosen.views else {}),
        "train": flags(chosen.training) + labels,
    }


def listing() -> str:
    """All recipes for a terminal: what for, and the settings."""
    blocks = []
    for name, each in RECIPES.items():
        lines = (f"    {command} {said}" for command, said in settings(name).items())
        teachers = (
            f"    train --model {model} {flags(each.teacher_training)} (a further teacher)" for model in each.more_teachers
        )
        blocks.append("\n".join([f"{name}: {each.purpose}", *teachers, *lines]))
    return "\n".join(blocks)
