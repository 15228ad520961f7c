"""Which part of the recipe earns what: the table that `fidelity.py ablations` goes through, a line for each change.

Every line changes one thing in `BASES`, which stays as it is when the shipped recipes become better, so that figures of
different times can be compared. The last lines lead to CIFAR-10's recipe, each a step further than a line before; some were
not taken. All are shown against the first line. Digits are there to try the table on.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Base:
    """Fields of `SynthesisConfig`, and of `TrainConfig` but for model, epochs and seed."""

    synthesis: dict
    training: dict


BASES = {  # by recipe
    "cifar10": Base(
        {
            "batch_size": 50,
            "low_resolution_iterations": 200,
            "iterations": 200,
            "first_site_weight": 10.0,
            "tv_weight": 1.0,
            "jitter": 2,
            "flip": True,
        },
        {"batch_size": 32, "lr": 0.003, "shift": 0, "flip": True, "crop_scale": 0.2},
    ),
    "digits": Base(
        {"batch_size": 100, "iterations": 300, "first_site_weight": 10.0},
        {"batch_size": 64, "lr": 0.01, "shift": 1, "label_smoothing": 0.1},
    ),
}


@dataclass(frozen=True)
class Variant:
    """One line.

    Attributes
    ----------
    name : of the change
    part : of the recipe that it is a change of
    synthesis, training : fields that are other than the base's
    scaled : fields of the synthesis → how many times the base's, or the default
    record : arguments of `bnfuse.record`
    micro_batch : images in the network together
    teachers : further ones, which the harness trains
    images : of each class that are made, where more are matched together than the student sees
    labels : what students learn, see `fidelity_cases.LABELS`
    towards : the recipe that it leads to, or whose base alone has what it changes
    """

    name: str
    part: str
    synthesis: dict = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    micro_batch: int | None = None
    teachers: tuple[str, ...] = ()
    images: int = 0
    labels: tuple[str, ...] = ("views",)
    towards: str | None = None


def _towards_cifar10() -> list[Variant]:
    """From the base, whose changes of part "start" come before, to the recipe, which is the last; with steps not taken."""
    spectrum = {"noise_exponent": 1.0, "step_exponent": 1.0, "chroma_scale": 0.3}  # of noise and steps, as photographs have it
    small_ce = spectrum | {"ce_weight": 0.3}
    in_turn = small_ce | {"teacher_plan": "in_turn", "iterations": 400}
    three = ("convnet3", "resnet8")  # with the first
    lines = (
        ("1/f noise and steps", spectrum, {}),
        ("1/f, 10 sub-classes", spectrum, {"record": {"subclasses": 10}}),
        ("1/f, less cross-entropy", small_ce, {}),
        ("1/f, 400 iterations", small_ce | {"iterations": 400}, {}),
        ("1/f, with a plain network", small_ce, {"teachers": ("convnet3",)}),
        ("1/f, two teachers in turn", in_turn, {"teachers": ("convnet3",)}),
        ("1/f, three teachers, 10 sub-classes", in_turn, {"teachers": three, "record": {"subclasses": 10}}),
        ("1/f, three teachers in turn", in_turn, {"teachers": three}),
    )
    return [Variant(name, "recipe", synthesis, towards="cifar10", **more) for name, synthesis, more in lines]


def _towards_digits() -> list[Variant]:
    """From the base to what the recipe's student does, which is the last."""
    lines = (
        ("no shifts", {"shift": 0}, ("soft", "hard")),  # labelled views have none anyway
        ("crops for shifts", {"shift": 0, "crop_scale": 0.6}, ("soft", "hard", "views")),
    )
    return [Variant(name, "recipe", training=training, labels=labels, towards="digits") for name, training, labels in lines]


ABLATIONS = (
    Variant("base", "", labels=("soft", "hard", "views")),
    # targets
    Variant("global targets", "targets", {"targets": "global"}, labels=("soft", "views")),
    Variant("running targets", "targets", {"targets": "running"}),
    Variant("half global", "targets", {"global_share": 0.5}),
    # iterations
    Variant("iterations ÷ 2", "iterations", scaled={"iterations": 0.5, "low_resolution_iterations": 0.5}),
    Variant("iterations × 3", "iterations", scaled={"iterations": 3, "low_resolution_iterations": 3}),
    Variant("no half-size stage", "iterations", {"iterations": 250, "low_resolution_iterations": 0}, towards="cifar10"),
    Variant("lr ÷ 2", "iterations", scaled={"lr": 0.5}),
    Variant("lr × 2", "iterations", scaled={"lr": 2}),
    # weights
    Variant("BN loss × 0.1", "weights", scaled={"bn_weight": 0.1}),
    Variant("BN loss × 10", "weights", scaled={"bn_weight": 10}),
    Variant("no cross-entropy", "weights", {"ce_weight": 0.0}),
    Variant("no BN loss", "weights", {"bn_weight": 0.0}),
    Variant("first site × 1", "weights", {"first_site_weight": 1.0}),
    Variant("first site × 100", "weights", {"first_site_weight": 100.0}),
    Variant("variances × 11", "weights", {"var_weight": 11.0}),
    Variant("a third of the sites left out", "weights", {"site_drop": 0.33}),
    # distances
    Variant("squared L2", "distances", {"distance": "l2_squared"}),
    Variant("mean squared error", "distances", {"distance": "mse"}),
    Variant("L1", "distances", {"distance": "l1"}),
    Variant("Gaussian KL", "distances", {"distance": "kl"}),
    Variant("relative L2", "distances", {"relative": True, "bn_weight": 100.0}),
    Variant("standard deviations", "distances", {"use_std": True}),
    # what is matched together
    Variant("batches of 10", "batches", {"batch_size": 10}),
    Variant("batches of 200", "batches", {"batch_size": 200}, micro_batch=50, images=200),
    Variant("batches of 512", "batches", {"batch_size": 512}, micro_batch=64, images=512),
    Variant("ten classes a batch", "batches", {"batch_size": 500, "classes_per_batch": 10}, micro_batch=50),
    Variant("mixed, one target", "batches", {"batch_size": 500, "classes_per_batch": 10, "groups": "batch"}, micro_batch=50),
    # priors
    Variant("no total variation", "priors", {"tv_weight": 0.0}),
    Variant("total variation × 10", "priors", scaled={"tv_weight": 10}),
    Variant("L2 of pixels", "priors", {"l2_weight": 0.1}),
    # the noise that images start from
    Variant("1/f noise", "start", {"noise_exponent": 1.0}, labels=("soft", "hard", "views")),
    Variant("1/f² noise", "start", {"noise_exponent": 2.0}, labels=("soft", "hard", "views")),
    # views
    Variant("no jitter, no flip", "views", {"jitter": 0, "flip": False}),
    Variant("jitter 4", "views", {"jitter": 4}),
    Variant("crops", "views", {"crop_scale": 0.25}),
    Variant("crops, as a curriculum", "views", {"crop_scale": 0.25, "crop_curriculum": 1.0}),
    # the student's training, on the images of the base
    Variant("temperature 1", "student", training={"temperature": 1.0}, labels=("soft",)),
    Variant("temperature 20", "student", training={"temperature": 20.0}, labels=("soft",)),
    Variant("CutMix", "student", training={"cutmix": 1.0}, labels=("soft",)),
    Variant("mixup", "student", training={"mixup": 0.8}, labels=("soft",)),
    Variant("smaller crops", "student", training={"crop_scale": 0.08}),
    Variant("shifts for crops", "student", training={"crop_scale": 1.0, "shift": 4}, labels=("soft",)),
    Variant("noisy pixels", "student", training={"noise": 0.05}, labels=("soft",)),
    # sub-classes
    Variant("3 sub-classes", "sub-classes", record={"subclasses": 3}),
    Variant("10 sub-classes", "sub-classes", record={"subclasses": 10}),
    # sites
    Variant("pixels too", "sites", {"sites": ("bn", "pixels")}, record={"sites": ("bn", "pixels")}),
    Variant(
        "pixel cells too, no half-size stage",
        "sites",
        {"sites": ("bn", "pixels@cells=8"), "iterations": 250, "low_resolution_iterations": 0},
        record={"sites": ("bn", "pixels@cells=8")},
        towards="cifar10",
    ),
    Variant("convolutions too", "sites", {"sites": ("bn", "conv")}, record={"sites": ("bn", "conv")}),
    # teachers
    Variant("with a plain network", "teachers", teachers=("convnet3",)),
    Variant("three teachers in turn", "teachers", {"teacher_plan": "in_turn"}, teachers=("convnet3", "resnet8")),
    # towards the recipes
    *_towards_digits(),
    *_towards_cifar10(),
)
