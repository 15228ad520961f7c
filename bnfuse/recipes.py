"""The settings that this package ships for three kinds of images: a synthesis's, and those of the student that learns from it.

A recipe is no more than default values of `SynthesisConfig` and `TrainConfig`: `recipe("cifar10").synthesis_config(seed=1)`, or
`bnfuse synthesize --recipe cifar10` and then `bnfuse train --recipe cifar10`, whose flags win over it. Other projects' settings
are in `presets`. docs/recipes.md shows what students come to with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .configs import flags
from .errors import InputError
from .plans import SynthesisConfig
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
    soft_labels : the student learns the teacher's logits, which the synthesis then stores
    """

    name: str
    purpose: str
    synthesis: dict[str, object]
    training: dict[str, object]
    soft_labels: bool

    def synthesis_config(self, **changes) -> SynthesisConfig:
        """With other values for some fields; InputError where they do not go with the rest."""
        return SynthesisConfig(**{**self.synthesis, "soft_labels": self.soft_labels, **changes, "recipe": self.name})

    def train_config(self, **changes) -> TrainConfig:
        """A student's, with other values for some fields; InputError where they do not go with the rest."""
        return TrainConfig(**{**self.training, **changes, "recipe": self.name})


_STUDENT = {"epochs": 150, "batch_size": 32, "lr": 0.003, "shift": 0, "flip": True, "crop_scale": 0.2}

RECIPES: dict[str, Recipe] = {
    each.name: each
    for each in (
        Recipe(
            "digits",
            "grey images of 8×8 pixels: the demo's handwritten digits",
            {"images_per_class": 100, "batch_size": 100, "iterations": 300, "first_site_weight": 10.0},
            {"model": "resnet20", "epochs": 30, "batch_size": 64, "lr": 0.01, "shift": 1, "label_smoothing": 0.1},
            soft_labels=False,
        ),
        Recipe(
            "cifar10",
            "colour images of 32×32 pixels: CIFAR-10, a ResNet-20 as teacher and as student",
            {
                "images_per_class": 50,
                "batch_size": 50,
                "low_resolution_iterations": 200,
                "iterations": 200,
                "first_site_weight": 10.0,
                "tv_weight": 1.0,
                "jitter": 2,
                "flip": True,
            },
            {"model": "resnet20", **_STUDENT},
            soft_labels=True,
        ),
        Recipe(
            "imagenet",
            "photographs of 224×224 pixels: ten classes of ImageNet, a MobileNetV1 ×0.25 as teacher; the student is a "
            "ResNet-20 that sees them at 64×64 (`--image-size 64`)",
            {
                "images_per_class": 4,
                "batch_size": 4,
                "iterations": 200,
                "lr": 0.2,
                "bn_weight": 0.01,
                "first_site_weight": 1.0,
                "tv_weight": 0.1,
                "jitter": 32,
                "flip": True,
            },
            {"model": "resnet20", **_STUDENT, "epochs": 600, "batch_size": 20},
            soft_labels=True,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """InputError, naming those that there are, where there is none of this name."""
    if name not in RECIPES:
        raise InputError(f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def settings(name: str) -> tuple[str, str]:
    """A recipe's flags of `bnfuse synthesize` and of `bnfuse train`."""
    chosen = RECIPES[name]
    soft = chosen.soft_labels
    return (
        flags(chosen.synthesis | ({"soft_labels": True} if soft else {})),
        flags(chosen.training) + (" --soft-labels" if soft else ""),
    )


def listing() -> str:
    """All recipes for a terminal: what for, and the settings."""
    blocks = []
    for name, each in RECIPES.items():
        synthesis, training = settings(name)
        blocks.append(f"{name}: {each.purpose}\n    synthesize {synthesis}\n    train {training}")
    return "\n".join(blocks)
