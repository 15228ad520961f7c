"""The command line: a subcommand for each step of the flow, under the name of its function.

Here are the entrance and what makes a synthetic dataset; `cli_dataset` has the subcommands for one that is there, `cli_flags`
what several share.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from pathlib import Path

from torch.utils.data import DataLoader

from . import __version__, presets, recipes
from . import cli_flags as flags
from .cli_dataset import add_audit, add_export, add_relabel, add_verify
from .configs import add_flags, given_flags
from .datasets import as_spec, class_counts, load_dataset
from .demo import run_demo
from .distributed import OtherRankFailed, rank
from .doctor import report
from .errors import BnfuseError, InputError, Interrupted, UnitWarning
from .estimate import check_space
from .estimators import VARIANCES, index_batches
from .files import check_place
from .labels import Labels, images_digest
from .manifest import is_store, read_store
from .models import SPEC_GRAMMAR, Teacher, batchnorm_layers, load_teacher
from .plans import SynthesisConfig
from .recipes import recipe
from .sites import SITE_GRAMMAR
from .statistics import MINIMUM_IMAGES, ClassStatistics, check_images_of_classes, record
from .statistics_file import check_replaceable
from .synthesis import synthesize
from .training import TrainConfig, labels_learnt, refuse_other_network, train
from .units import outputs_asked, recognised


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand.

    Returns the exit status: 0, 1 where `verify` found something wrong, 2 for an error the user can mend, 130 when interrupted,
    141 when whoever read the output has gone, 143 when terminated.
    """
    number = rank()
    name = f"bnfuse: rank {number}:" if number else "bnfuse:"

    def say(text: str) -> None:
        print(f"{name} {text}", file=sys.stderr, flush=True)

    def note(message, category, *_) -> None:
        if not number or issubclass(category, UnitWarning):  # what the first rank says need not be said by all
            say(f"note: {message}")

    warnings.showwarning = note
    try:
        args = _parser().parse_args(argv)
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain again when it ends
        return 128 + signal.SIGPIPE
    except OtherRankFailed as error:
        say(str(error))
        return 2
    except Interrupted as stopped:
        say(str(stopped))
        return 128 + stopped.signal
    except (BnfuseError, OSError) as error:  # OSError: a full disk, a missing permission; no file is ever torn
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        rest = "the same command goes on with what is not done yet"
        if args.command in ("train", "record"):
            rest = "nothing of it is kept, and the same command begins anew"
        say(f"stopped; {rest}")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnfuse",
        description="Turns a private image dataset into a synthetic one that can be published in its place.",
    )
    parser.add_argument("--version", action="version", version=f"bnfuse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flow = (_add_train, _add_record, _add_synthesize, add_audit)
    for add in (*flow, add_verify, add_relabel, add_export, _add_demo, _add_doctor):
        add(commands)
    return parser


# ---- bnfuse train ----


def _add_train(commands) -> None:
    parser = flags.add_command(
        commands,
        "train",
        _train,
        "Train a network from scratch, a teacher on private images or a student on synthetic ones, and test it.",
        flags.GRAMMARS,
    )
    parser.add_argument("--data", required=True, metavar="DATASET", help="the images to train on")
    parser.add_argument("--test", metavar="DATASET", help="real images of the same classes to test on")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for model.safetensors and metrics.json; one with the network of another training is refused",
    )
    parser.add_argument("--soft-labels", action="store_true", help="learn the stored logits: --labels soft")
    parser.add_argument(
        "--labels",
        metavar="WHICH",
        help="what to learn: hard, the classes (default); soft, the logits that `bnfuse synthesize --soft-labels` stored; "
        "relabel, what `bnfuse relabel` wrote beside the images; or a folder that it wrote. Of views the network sees those, "
        "and none of the augmentation below. Default of a recipe: what it says",
    )
    parser.add_argument("--limit-per-class", type=int, metavar="N", help="use only the first N images of each class")
    flags.add_image_flags(parser)
    flags.add_device(parser)
    flags.add_listing(parser, "--list-recipes", recipes.listing, "--recipe")
    add_flags(parser, TrainConfig)


def _train(args) -> None:
    given = given_flags(TrainConfig, args)
    chosen = recipe(given.pop("recipe")) if "recipe" in given else None
    config = TrainConfig(**given) if chosen is None else chosen.train_config(**given)
    which = args.labels or ("soft" if args.soft_labels else "hard" if chosen is None else chosen.labels)
    labels = None if which in ("hard", "soft") else _labels(args, which)
    data = flags.load_data(args)
    if args.limit_per_class is not None:
        data = data.first_per_class(args.limit_per_class)
    test = (
        None
        if args.test is None
        else load_dataset(args.test, image_size=flags.size(args), channels=flags.channels(args), download=args.download)
    )
    refuse_other_network(args.out, config, data, labels_learnt(which == "soft", labels))
    result = train(
        data,
        config,
        test=test,
        preprocessing=flags.preprocessing(args),
        soft_labels=which == "soft",
        labels=labels,
        out=args.out,
        device=flags.device(args),
    )
    print(
        f"trained {config.model} on {len(data)} images in {result.seconds:.0f} s: "
        f"{result.train_accuracy:.1%} of them classified as labelled"
    )
    if result.accuracy is not None:
        print(f"accuracy on {args.test}: {result.accuracy:.1%}{'' if result.auc is None else f'; AUC {result.auc:.3f}'}")
    print(f"wrote {args.out / 'model.safetensors'} and {args.out / 'metrics.json'}")


def _labels(args, which: str) -> Labels:
    """What `bnfuse relabel` wrote of --data, and of no other images."""
    if not is_store(args.data):
        raise InputError(f"--labels {which} needs a dataset that bnfuse made, --data {args.data} is none")
    labels = flags.open_labels(Path(args.data), which)
    labels.check(images_digest(read_store(args.data).entries))
    return labels


# ---- bnfuse record ----


def _add_record(commands) -> None:
    parser = flags.add_command(
        commands,
        "record",
        _record,
        "Record the class-wise statistics of private images inside a teacher, in one pass.",
        f"{flags.GRAMMARS}\n{SITE_GRAMMAR}",
    )
    flags.add_teacher(parser)
    parser.add_argument("--data", required=True, metavar="DATASET", help="the private images, each seen once")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the statistics, .safetensors")
    parser.add_argument(
        "--outputs",
        type=int,
        nargs="+",
        metavar="K",
        help="the teacher's output for each class of the dataset, where the names of its classes do not tell",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        default=["bn"],
        metavar="RULE",
        help="which tensors of the teacher, see below (default bn: the inputs of its BatchNorm layers)",
    )
    parser.add_argument(
        "--class-variance",
        choices=VARIANCES,
        default="pooled",
        help="of all elements of a class (pooled, the default), or as others gather it: averaged over images (EDC), over "
        "batches of one class (WMDD), or in a moving average over shuffled batches (ema: LPLD)",
    )
    parser.add_argument(
        "--subclasses",
        type=int,
        default=1,
        metavar="K",
        help="statistics for each of at most K clusters of a class's images, by the teacher's features; no cluster has fewer "
        "images than a class must have (default 1: of each class as a whole)",
    )
    parser.add_argument(
        "--subclass-teacher",
        metavar="MODEL",
        help="the network whose features those are: for a further teacher, the first (default --teacher itself)",
    )
    parser.add_argument("--subclass-weights", metavar="FILE|NAME", help="its weights")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the order of images in an ema (default 0)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a pass (default 128)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)")
    parser.add_argument(
        "--minimum-images",
        type=int,
        default=MINIMUM_IMAGES,
        metavar="N",
        help=f"refuse a class with fewer images (default {MINIMUM_IMAGES})",
    )
    parser.add_argument("--allow-few-images", action="store_true", help="record it nevertheless: its images may show")
    flags.add_device(parser)


def _record(args) -> None:
    check_place(args.out)
    check_replaceable(args.out)
    if args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    teacher = flags.load_teacher(args)
    data = load_dataset(
        args.data,
        image_size=teacher.preprocessing.image_size,
        channels=teacher.preprocessing.channels,
        download=args.download,
    )
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.class_variance != "ema":  # of which it is not known before the pass how many images count
        check_images_of_classes(class_counts(data), data.class_names, args.minimum_images, args.allow_few_images)
    if args.sites == ["bn"]:  # of others it is not known before the pass how many channels they have
        channels = sum(layer.num_features for layer in batchnorm_layers(teacher.model).values())
        check_space(args.out, 16 * channels * data.num_classes, "statistics")  # at least: two float64 a channel and class
    order = index_batches(args.class_variance, data.labels, args.batch_size, args.seed)
    statistics = record(
        teacher,
        DataLoader(data, batch_sampler=order, num_workers=args.workers),
        data.num_classes,
        sites=args.sites,
        variance=args.class_variance,
        class_names=data.class_names,
        outputs=args.outputs,
        dataset=data.name,
        minimum_images=args.minimum_images,
        allow_few_images=args.allow_few_images,
        subclasses=args.subclasses,
        subclass_teacher=flags.load_subclass_teacher(args),
        progress=True,
    )
    statistics.save(args.out)
    sites = "BatchNorm layers" if args.sites == ["bn"] else "sites"
    parts = "" if statistics.row_classes is None else f", {len(statistics.row_classes)} sub-classes,"
    print(
        f"recorded {int(statistics.images.sum())} images of {statistics.num_classes} classes{parts} at {len(statistics.sites)} "
        f"{sites} ({sum(statistics.site_channels.values())} channels): {args.out}"
    )


# ---- bnfuse synthesize ----


def _add_synthesize(commands) -> None:
    parser = flags.add_command(
        commands,
        "synthesize",
        _synthesize,
        "Make a synthetic dataset from noise. Stopped and started again, it continues. Under torchrun, many ranks make it.",
        f"{SPEC_GRAMMAR}\n{SITE_GRAMMAR}",
    )
    flags.add_teacher(parser)
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="what `bnfuse record` wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the dataset")
    flags.add_kernels(parser)
    parser.add_argument(
        "--offload", action="store_true", help="keep the batch's images off the device, but a micro-batch of them"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="capture the network's part of a step on a GPU and replay it")
    parser.add_argument(
        "--ranks-per-batch",
        type=int,
        default=1,
        metavar="R",
        help="under torchrun, ranks that share each batch (default 1: every rank makes batches of its own)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="keep a batch that is being made every N iterations (default 0: only when SIGTERM or SIGINT stops the run)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="how often a batch whose loss is not finite is made again from other seeds (default 2)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of the CPU, for each rank; the same number gives the same bytes (default that which the dataset was begun with)",
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write losses, learning rate and pace for TensorBoard"
    )
    flags.add_more_teachers(parser)
    parser.add_argument(
        "--judge",
        metavar="MODEL",
        help="another network, with the teacher's classes or the dataset's, that says at the end how many images it takes for "
        "what was asked; it has no part in making them",
    )
    parser.add_argument("--judge-weights", metavar="FILE|NAME", help="its weights")
    flags.add_listing(parser, "--list-presets", presets.listing, "--preset")
    flags.add_listing(parser, "--list-recipes", recipes.listing, "--recipe")
    add_flags(parser, SynthesisConfig)


def _synthesize(args) -> None:
    config = _synthesis_config(given_flags(SynthesisConfig, args))
    teacher = flags.load_teacher(args)
    judge = _load_judge(args, teacher)
    statistics = None if args.statistics is None else ClassStatistics.load(args.statistics)
    if judge is not None:
        outputs_asked(teacher, statistics, config, judge)  # before the work, where it cannot judge
    result = synthesize(
        teacher,
        statistics,
        args.out,
        config,
        device=args.device,
        backend=args.backend,
        micro_batch=args.micro_batch,
        offload=args.offload,
        cuda_graph=args.cuda_graph,
        tensorboard=args.tensorboard,
        ranks_per_batch=args.ranks_per_batch,
        checkpoint_every=args.checkpoint_every,
        retries=args.retries,
        threads=args.threads,
        more_teachers=flags.load_more_teachers(args),
    )
    if rank():
        return
    rate = f" in {result.seconds:.0f} s" if result.made else ", which were there already"
    print(f"{result.images} images, {result.made} made now{rate}: {result.out / 'images'}")
    share = recognised(teacher, statistics, result.out, config, micro_batch=args.micro_batch)
    print(f"the teacher takes {share:.1%} of them for what was asked")
    if judge is not None:
        share = recognised(teacher, statistics, result.out, config, micro_batch=args.micro_batch, judge=judge)
        print(f"the judge ({judge.architecture}) takes {share:.1%} of them for it")
    by_recipe = "" if config.recipe is None else f" --recipe {config.recipe}"
    if by_recipe and recipe(config.recipe).views:
        print(f"the recipe's student learns labels of views: `bnfuse relabel {result.out}{by_recipe} --teacher …`")
    trained = f"bnfuse train --data {as_spec(result.out)}{by_recipe}"
    print(f"look at {result.out / 'contact_sheet.png'}; train on it with `{trained}`")


def _synthesis_config(given: dict[str, object]) -> SynthesisConfig:
    """What the flags say, over a preset or a recipe where one is named; `SynthesisConfig` refuses both."""
    if given.get("preset") is not None:
        return presets.preset(given.pop("preset"), **given)
    if given.get("recipe") is not None:
        return recipe(given.pop("recipe")).synthesis_config(**given)
    return SynthesisConfig(**given)


def _load_judge(args, teacher: Teacher) -> Teacher | None:
    """On the device; it is shown images as its weights say, else as the teacher is."""
    if args.judge is None:
        return None
    judge = load_teacher(args.judge, weights=args.judge_weights, default_preprocessing=teacher.preprocessing)
    judge.model.to(flags.device(args))
    return judge


# ---- bnfuse demo, bnfuse doctor ----


def _add_demo(commands) -> None:
    parser = flags.add_command(
        commands,
        "demo",
        _demo,
        "The whole flow on scikit-learn's handwritten digits: teacher, statistics, synthesis, students, pictures.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder (default runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")


def _demo(args) -> None:
    run_demo(args.out, seed=args.seed)


def _add_doctor(commands) -> None:
    flags.add_command(
        commands,
        "doctor",
        lambda args: print(report()),
        "Print versions, backends with the reason why one is missing, threads and instruction sets.",
    )
