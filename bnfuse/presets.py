"""The settings of other projects, by name: what their objectives are, as far as a private dataset and this driver allow.

A preset is no more than default values of `SynthesisConfig`: `preset("cda", images_per_class=50)`, or `bnfuse synthesize
--preset cda`, whose flags win over it. What a project does that the driver does not is said in its line. Values are the
defaults of the projects' own scripts for ImageNet-1k unless a line says otherwise; docs/presets.md shows this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .configs import flags
from .errors import InputError
from .plans import SynthesisConfig


@dataclass(frozen=True)
class Preset:
    """One project's settings.

    Attributes
    ----------
    source : the paper and whose code the values are from
    left_out : what the project does beside, and what is otherwise here, and why
    fields : of `SynthesisConfig`; those not named have its defaults
    """

    source: str
    left_out: str
    fields: dict[str, object] = field(default_factory=dict)


# SRe2L's loop, which most of its successors share: whole batches of different classes, running statistics, one crop a batch.
_SRE2L = {
    "targets": "running",
    "class_plan": "balanced",
    "batch_size": 100,
    "iterations": 4000,
    "lr": 0.25,
    "bn_weight": 0.01,
    "first_site_weight": 10.0,
    "jitter": 32,
    "flip": True,
    "crop_scale": 0.08,
}

# Pixels in place of a generator's output, with the statistic loss of the generator's training.
_QUANTISATION = {
    "targets": "running",
    "class_plan": "balanced",
    "first_site_weight": 1.0,
    "distance": "mse",
    "site_reduction": "mean",
}

# ZeroQ's steps on pixels, which other projects that quantise without data take over.
_ZEROQ_STEPS = {
    "batch_size": 64,
    "iterations": 500,
    "lr": 0.5,
    "betas": (0.9, 0.999),
    "schedule": "constant",
    "clip": False,
}

PRESETS: dict[str, Preset] = {
    "soufleri": Preset(
        "arXiv 2210.03205, this package's own",
        "nothing",
        {},
    ),
    "deepinversion": Preset(
        "arXiv 1912.08795, NVlabs/DeepInversion",
        "the competition with a student; the half-size stage starts from noise of half the size, not from pooled noise",
        {
            "targets": "running",
            "class_plan": "balanced",
            "batch_size": 84,
            "low_resolution_iterations": 2000,
            "iterations": 1000,
            "lr": 0.2,
            "warmup": 100,
            "bn_weight": 0.05,
            "first_site_weight": 10.0,
            "tv_weight": 1e-4,
            "l2_weight": 1e-5,
            "prior_kind": "norms",
            "jitter": 30,
            "flip": True,
        },
    ),
    "sre2l": Preset("arXiv 2306.13092, VILA-Lab/SRe2L", "relabelling, which `bnfuse relabel` does", _SRE2L),
    "cda": Preset(
        "arXiv 2311.18838, VILA-Lab/SRe2L/CDA",
        "relabelling, which `bnfuse relabel` does",
        {**_SRE2L, "crop_curriculum": 1.0},
    ),
    "lpld": Preset(
        "arXiv 2410.15919, he-y/soft-label-pruning-for-dataset-distillation",
        "label pruning. Its own class variances are those of `bnfuse record --class-variance ema`",
        {**_SRE2L, "targets": "class", "groups": "class", "class_plan": "grouped", "classes_per_batch": 1, "batch_size": 200},
    ),
    "wmdd": Preset(
        "arXiv 2311.18531, Liu-Hy/WMDD (Imagenette)",
        "the barycentre of features, which is of real images; cross-entropy takes its place. Its own class variances are those "
        "of `bnfuse record --class-variance batches`",
        {
            **_SRE2L,
            "targets": "class",
            "groups": "class",
            "class_plan": "grouped",
            "classes_per_batch": 10,
            "iterations": 1000,
            "lr": 0.1,
            "bn_weight": 10.0,
        },
    ),
    "gvbsm": Preset(
        "arXiv 2311.17950, shaoshitong/G_VBSM_Dataset_Condensation",
        "the nuclear norm; averages restart with each batch of images and do not persist over them, since batches here do not "
        "depend on each other; BN layers are held to recorded statistics too, not to running ones",
        {
            **_SRE2L,
            "sites": ("bn", "conv", "conv@cells=16"),
            "targets": "global",
            "groups": "batch",
            "class_plan": "grouped",
            "classes_per_batch": 10,
            "lr": 0.1,
            "moving_average": 0.4,
            "moving_average_gradient": "straight_through",
            "moving_average_start": "zero",
            "teacher_plan": "in_turn",
        },
    ),
    "edc": Preset(
        "arXiv 2404.13733, shaoshitong/EDC",
        "real images to start from, which a private dataset forbids; the flatness term; averages restart with each batch. Its "
        "own class variances are those of `bnfuse record --class-variance images`",
        {
            **_SRE2L,
            "sites": ("bn", "conv", "conv@cells=16"),
            "targets": "class",
            "groups": "batch",
            "global_share": 0.5,
            "global_blend": "distances",
            "class_plan": "grouped",
            "classes_per_batch": 10,
            "iterations": 1000,
            "lr": 0.05,
            "bn_weight": 0.1,
            "moving_average": 0.8,
            "moving_average_gradient": "straight_through",
            "moving_average_start": "zero",
            "teacher_plan": "in_turn",
        },
    ),
    "dwa": Preset(
        "arXiv 2409.17612 (var_weight 2 for ImageNet-1k)",
        "real images to start from, which a private dataset forbids; the perturbed weights",
        {**_SRE2L, "var_weight": 11.0},
    ),
    "cvdd": Preset(
        "arXiv 2501.07575, Jiacheng8/CV-DD",
        "patches of real images to start from; float16. Give --teacher-priors, one accuracy a teacher",
        {**_SRE2L, "teacher_plan": "drawn", "teachers_drawn": 2, "teacher_temperature": 5.0},
    ),
    "fadrm": Preset(
        "arXiv 2506.24125, Jiacheng8/FADRM",
        "residuals of real patches, and the stages of size between which they are mixed in; float16 activations",
        {**_SRE2L, "teacher_plan": "in_turn", "round_moments": True},
    ),
    "zeroq": Preset(
        "arXiv 2001.00281, amirgholami/ZeroQ",
        "the plateau schedule, which would wait for the device at every step: the rate is constant; a BN layer's own input "
        "stands for the convolution counted off before it; the pixels' target is a variance of 1, not a deviation",
        {
            "sites": ("bn", "pixels"),
            "targets": "running",
            "groups": "sample",
            "class_plan": "balanced",
            **_ZEROQ_STEPS,
            "noise_scale": 0.0136,
            "ce_weight": 0.0,
            "distance": "l2_squared",
            "use_std": True,
            "distance_eps": 1e-6,
            "unbiased": True,
            "first_site_weight": 1.0,
        },
    ),
    "gdfq": Preset(
        "arXiv 2003.03603, xushoukai/GDFQ (CIFAR)",
        "the generator: pixels are optimised in its place, with our steps and rate",
        {**_QUANTISATION, "batch_size": 200, "bn_weight": 0.1},
    ),
    "intraq": Preset(
        "arXiv 2111.09136, zysxmu/IntraQ",
        "the margins between features, and soft targets drawn at random: cross-entropy takes their place; the plateau schedule",
        {**_QUANTISATION, **_ZEROQ_STEPS, "batch_size": 256, "iterations": 1000, "flip": True, "crop_scale": 0.4},
    ),
    "fast_datafree": Preset(
        "arXiv 2112.06253, zju-vipa/Fast-Datafree (CIFAR)",
        "the generator and its meta-learning: pixels are optimised in its place; the adversarial term, which needs a student",
        {
            "targets": "running",
            "class_plan": "balanced",
            "batch_size": 256,
            "bn_weight": 10.0,
            "ce_weight": 0.4,
            "first_site_weight": 1.0,
            "moving_average": 0.9,
            "moving_average_gradient": "scaled",
            "moving_average_start": "first",
        },
    ),
    "breaching": Preset(
        "arXiv 2104.07586 (GradInversion), JonasGeiping/breaching",
        "the matching of a victim's gradients, so that what is left is its image prior: no attack comes of it",
        {
            "targets": "running",
            "class_plan": "balanced",
            "batch_size": 8,
            "iterations": 20000,
            "lr": 0.1,
            "ce_weight": 0.0,
            "bn_weight": 0.1,
            "first_site_weight": 10.0,
            "tv_weight": 1e-4,
            "l2_weight": 1e-6,
        },
    ),
    "abd": Preset(
        "arXiv 2106.09701, GT-RIPL/AlwaysBeDreaming-DFCIL (CIFAR-100)",
        "the generator, the blur prior and the balance of predicted classes: each image has a class of its own here",
        {
            "targets": "running",
            "class_plan": "balanced",
            "batch_size": 128,
            "bn_weight": 50.0,
            "first_site_weight": 1.0,
            "distance": "kl_reverse",
            "distance_eps": 1e-8,
            "site_reduction": "mean",
        },
    ),
    "dsg": Preset(
        "arXiv 2103.01049 (steps and rate are ZeroQ's)",
        "a slack for every layer from the .9 quantile of noise's statistics: one for all here, set it with --slack",
        {
            "targets": "running",
            "groups": "sample",
            "class_plan": "balanced",
            **_ZEROQ_STEPS,
            "ce_weight": 0.0,
            "distance": "hinge",
            "slack": 0.1,
            "use_std": True,
            "first_site_weight": 1.0,
            "site_enhancement": 1.0,
        },
    ),
    "dp_imgsyn": Preset(
        "Soufleri et al. 2024, Efstathia-Soufleri/DP-ImgSyn (images of 32×32)",
        "public images to start from; the image of least loss instead of the last. For a teacher with GroupNorm give "
        "--sites type=GroupNorm",
        {
            "targets": "global",
            "groups": "batch",
            "class_plan": "balanced",
            "batch_size": 128,
            "iterations": 1000,
            "lr": 0.1,
            "betas": (0.5, 0.99),
            "schedule": "constant",
            "bn_weight": 10.0,
            "first_site_weight": 1.0,
            "tv_weight": 1e-5,
            "prior_kind": "absolute",
            "jitter": 4,
            "flip": True,
            "soft_labels": True,
        },
    ),
}


def preset(name: str, **changes) -> SynthesisConfig:
    """A project's settings, with some of their own.

    Parameters
    ----------
    name : one of `PRESETS`
    changes : fields of `SynthesisConfig`; they win

    Raises
    ------
    InputError : there is no such preset, or a change does not go with the rest
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; choose one of {', '.join(PRESETS)}")
    return SynthesisConfig(**{**PRESETS[name].fields, **changes, "preset": name})


def settings(name: str) -> str:
    """A preset's fields in the words of the command line: ``--targets running --batch-size 100``."""
    return flags(PRESETS[name].fields) or "the defaults"


def listing() -> str:
    """All presets for a terminal: source, settings, and what is left out."""
    blocks = (
        f"{name}: {each.source}\n    {settings(name)}\n    left out, or otherwise: {each.left_out}"
        for name, each in PRESETS.items()
    )
    return "\n".join(blocks)


def table() -> str:
    """All presets in Markdown, for docs/presets.md."""
    rows = [
        "| preset | from | settings that are not the defaults | left out, or otherwise |",
        "|---|---|---|---|",
        *(f"| `{name}` | {each.source} | `{settings(name)}` | {each.left_out} |" for name, each in PRESETS.items()),
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
