"""The command line: one subcommand for every function of the public API, under the same name."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from . import __version__, presets, recipes
from .audit import MEASURES, audit
from .audit.context import BUDGETS, NOISE
from .audit.running import command_line
from .audit.summary import verdict_lines
from .backends import BACKENDS
from .configs import add_flags, from_flags, given_flags
from .datasets import SPEC_GRAMMAR as DATASET_GRAMMAR
from .datasets import load_dataset
from .demo import run_demo
from .distributed import OtherRankFailed, choose_device, rank
from .doctor import report
from .errors import BnfuseError, InputError, Interrupted, UnitWarning
from .estimate import readable_bytes
from .estimators import VARIANCES, index_batches
from .exporting import FORMATS, export
from .labels import LABELS, RELABEL, Labels, images_digest
from .manifest import inspect, is_store, read_store, some
from .models import SPEC_GRAMMAR, Teacher, load_teacher
from .plans import SynthesisConfig
from .preprocessing import Preprocessing
from .recipes import recipe
from .relabelling import RelabelConfig, relabel
from .repair import repair
from .sites import SITE_GRAMMAR
from .statistics import MINIMUM_IMAGES, ClassStatistics, record
from .synthesis import synthesize
from .training import TrainConfig, train
from .units import recognised

_GRAMMARS = f"A dataset is named by one of\n{textwrap.indent(DATASET_GRAMMAR, '  ')}\n{SPEC_GRAMMAR}"


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
        say("stopped; the same command goes on with what is not done yet")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnfuse",
        description="Turns a private image dataset into a synthetic one that can be published in its place.",
    )
    parser.add_argument("--version", action="version", version=f"bnfuse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flow = (_add_train, _add_record, _add_synthesize, _add_audit)
    for add in (*flow, _add_verify, _add_relabel, _add_export, _add_demo, _add_doctor):
        add(commands)
    return parser


def _command(commands, name: str, run, help: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


# ---- bnfuse train ----


def _add_train(commands) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "Train a network from scratch, a teacher on private images or a student on synthetic ones, and test it.",
        _GRAMMARS,
    )
    parser.add_argument("--data", required=True, metavar="DATASET", help="the images to train on")
    parser.add_argument("--test", metavar="DATASET", help="real images of the same classes to test on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for model.safetensors and metrics.json")
    parser.add_argument("--soft-labels", action="store_true", help="learn the stored logits: --labels soft")
    parser.add_argument(
        "--labels",
        metavar="WHICH",
        help="what to learn: hard, the classes (default); soft, the logits that `bnfuse synthesize --soft-labels` stored; "
        "relabel, what `bnfuse relabel` wrote beside the images; or a folder that it wrote. Of views the network sees those, "
        "and none of the augmentation below. Default of a recipe: what it says",
    )
    parser.add_argument("--limit-per-class", type=int, metavar="N", help="use only the first N images of each class")
    _add_image_flags(parser)
    _add_device(parser)
    _add_listing(parser, "--list-recipes", recipes.listing, "--recipe")
    add_flags(parser, TrainConfig)


def _train(args) -> None:
    given = given_flags(TrainConfig, args)
    chosen = recipe(given.pop("recipe")) if "recipe" in given else None
    config = TrainConfig(**given) if chosen is None else chosen.train_config(**given)
    soft = args.soft_labels or (chosen is not None and chosen.soft_labels)
    which = args.labels or ("soft" if soft else "hard")
    labels = None if which in ("hard", "soft") else _labels(args, which)
    data = _load_data(args)
    if args.limit_per_class is not None:
        data = data.first_per_class(args.limit_per_class)
    test = (
        None
        if args.test is None
        else load_dataset(args.test, image_size=_size(args), channels=_channels(args), download=args.download)
    )
    result = train(
        data,
        config,
        test=test,
        preprocessing=_preprocessing(args),
        soft_labels=which == "soft",
        labels=labels,
        out=args.out,
        device=_device(args),
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
    labels = _open_labels(Path(args.data), which)
    labels.check(images_digest(read_store(args.data).entries))
    return labels


def _open_labels(dataset: Path, which: str) -> Labels:
    """Those beside the dataset's images, or in another folder."""
    return Labels(dataset / RELABEL if which == "relabel" else which)


# ---- bnfuse record ----


def _add_record(commands) -> None:
    parser = _command(
        commands,
        "record",
        _record,
        "Record the class-wise statistics of private images inside a teacher, in one pass.",
        f"{_GRAMMARS}\n{SITE_GRAMMAR}",
    )
    _add_teacher(parser)
    parser.add_argument("--data", required=True, metavar="DATASET", help="the private images, each seen once")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the statistics, .safetensors")
    parser.add_argument(
        "--outputs",
        type=int,
        nargs="+",
        metavar="K",
        help="the teacher's output for each class of the dataset, where the teacher knows more classes",
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
    _add_device(parser)


def _record(args) -> None:
    teacher = _load_teacher(args)
    data = load_dataset(
        args.data,
        image_size=teacher.preprocessing.image_size,
        channels=teacher.preprocessing.channels,
        download=args.download,
    )
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
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
    parser = _command(
        commands,
        "synthesize",
        _synthesize,
        "Make a synthetic dataset from noise. Stopped and started again, it continues. Under torchrun, many ranks make it.",
        f"{SPEC_GRAMMAR}\n{SITE_GRAMMAR}",
    )
    _add_teacher(parser)
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="what `bnfuse record` wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the dataset")
    _add_kernels(parser)
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
    _add_more_teachers(parser)
    parser.add_argument(
        "--judge",
        metavar="MODEL",
        help="another network, with the teacher's classes or the dataset's, that says at the end how many images it takes for "
        "what was asked; it has no part in making them",
    )
    parser.add_argument("--judge-weights", metavar="FILE|NAME", help="its weights")
    _add_listing(parser, "--list-presets", presets.listing, "--preset")
    _add_listing(parser, "--list-recipes", recipes.listing, "--recipe")
    add_flags(parser, SynthesisConfig)


def _synthesize(args) -> None:
    config = _synthesis_config(given_flags(SynthesisConfig, args))
    teacher = _load_teacher(args)
    judge = _load_judge(args, teacher)
    statistics = None if args.statistics is None else ClassStatistics.load(args.statistics)
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
        more_teachers=_load_more_teachers(args),
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
    print(f"look at {result.out / 'contact_sheet.png'}; train on it with `bnfuse train --data {result.out}`")


def _load_judge(args, teacher: Teacher) -> Teacher | None:
    """On the device; it is shown images as its weights say, else as the teacher is."""
    if args.judge is None:
        return None
    judge = load_teacher(args.judge, weights=args.judge_weights, default_preprocessing=teacher.preprocessing)
    judge.model.to(_device(args))
    return judge


def _synthesis_config(given: dict[str, object]) -> SynthesisConfig:
    """What the flags say, over a preset or a recipe where one is named; `SynthesisConfig` refuses both."""
    if given.get("preset") is not None:
        return presets.preset(given.pop("preset"), **given)
    if given.get("recipe") is not None:
        return recipe(given.pop("recipe")).synthesis_config(**given)
    return SynthesisConfig(**given)


# ---- bnfuse audit ----


def _add_audit(commands) -> None:
    parser = _command(
        commands,
        "audit",
        _audit,
        "Measure what a synthetic dataset gives away of the private images, with controls, and write a report. Stopped and "
        "started again, it continues.",
        _GRAMMARS,
    )
    parser.add_argument("--private", required=True, metavar="DATASET", help="what the synthetic images were made from")
    parser.add_argument("--synthetic", required=True, metavar="DATASET", help="what is to be published")
    parser.add_argument(
        "--heldout", metavar="DATASET", help="real images like the private ones, but not among them: the baseline"
    )
    _add_teacher(parser, required=False)
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="what `bnfuse record` wrote")
    parser.add_argument("--budget", choices=BUDGETS, default="quick", help="how long attacks try (default quick, a first look)")
    parser.add_argument("--only", choices=MEASURES, nargs="+", metavar="NAME", help=f"of {', '.join(MEASURES)} (default all)")
    parser.add_argument(
        "--noise",
        type=float,
        default=NOISE,
        metavar="S",
        help=f"standard deviation of the noised originals' noise, of pixels in [0, 1] (default {NOISE})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="DIR", help="folder (default runs/audit)")
    _add_device(parser)


def _audit(args) -> None:
    teacher = None if args.teacher is None else _load_teacher(args)
    size, channels = _size(args), _channels(args)
    if teacher is not None:
        size, channels = teacher.preprocessing.image_size, teacher.preprocessing.channels
    data = {
        role: None if spec is None else load_dataset(spec, image_size=size, channels=channels, download=args.download)
        for role, spec in {"private": args.private, "synthetic": args.synthetic, "heldout": args.heldout}.items()
    }
    unneeded = ("command", "run", "only", "device")  # by whoever makes the audit again
    result = audit(
        **data,
        out=args.out,
        teacher=teacher,
        statistics=None if args.statistics is None else ClassStatistics.load(args.statistics),
        budget=args.budget,
        measures=args.only,
        noise=args.noise,
        device=_device(args),
        seed=args.seed,
        command=command_line(**{name: value for name, value in vars(args).items() if name not in unneeded}),
    )
    print(verdict_lines(result.findings))
    print(f"the report, which shows private images: {result.report}")


# ---- bnfuse verify ----


def _add_verify(commands) -> None:
    parser = _command(
        commands,
        "verify",
        _verify,
        "Hold every file of a synthetic dataset against its hash; make again what is damaged.",
        SPEC_GRAMMAR,
    )
    parser.add_argument(
        "data", type=Path, metavar="DIR", help="the dataset, finished or not; exit status 1 if anything is wrong"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="make damaged and missing images again, with the --teacher and --statistics that the dataset was made from",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --repair: take images that differ from those that were there, as those from another machine may",
    )
    _add_teacher(parser, required=False)
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="what `bnfuse record` wrote")
    _add_more_teachers(parser)
    _add_kernels(parser)


def _verify(args) -> int:
    if args.repair and args.teacher is None:
        raise InputError("--repair makes images again: give the --teacher and --statistics that the dataset was made from")
    if not args.repair:
        problems = inspect(args.data, progress=True).problems
        print("\n".join(problems) or f"{args.data}: every file is as it was written, and nothing is missing")
        return bool(problems)
    statistics = None if args.statistics is None else ClassStatistics.load(args.statistics)
    teacher = _load_teacher(args)
    result = repair(
        teacher,
        statistics,
        args.data,
        accept_changes=args.accept_changes,
        device=args.device,
        backend=args.backend,
        micro_batch=args.micro_batch,
        more_teachers=_load_more_teachers(args),
    )
    for what, lines in (("found", result.found), ("made again", result.restored), ("replaced", result.replaced)):
        for line in lines:
            print(f"{what}: {line}")
    if result.differing:
        print(
            f"{len(result.differing)} files would not be what they were ({some(result.differing)}): {result.why}. Nothing was "
            "done to them; --accept-changes takes them as they come out now"
        )
    print("\n".join(["what is left:", *result.problems]) if result.problems else "now everything is as it should be")
    return bool(result.problems)


# ---- bnfuse relabel ----


def _add_relabel(commands) -> None:
    parser = _command(
        commands,
        "relabel",
        _relabel,
        "Label a finished dataset with a teacher: each image, or many augmented views of each. Stopped and started again, it "
        "continues.",
        SPEC_GRAMMAR,
    )
    parser.add_argument("dataset", type=Path, metavar="DIR", help="the dataset")
    _add_teacher(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"folder of the labels (default {RELABEL} in DIR)")
    parser.add_argument(
        "--outputs",
        type=int,
        nargs="+",
        metavar="K",
        help="the teacher's output for each class of the dataset, where it has more",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)")
    _add_device(parser)
    add_flags(parser, RelabelConfig)


def _relabel(args) -> None:
    config = from_flags(RelabelConfig, args)
    teacher = _load_teacher(args)
    done = relabel(
        args.dataset, teacher, config, out=args.out, outputs=args.outputs, device=_device(args), workers=args.workers
    )
    rate = f" in {done.seconds:.0f} s" if done.made else ", which were there already"
    print(f"labels of {done.views:,} views, {done.made:,} made now{rate}, {readable_bytes(done.bytes)}: {done.out}")
    labels = RELABEL if args.out is None else args.out
    print(f"learn them with `bnfuse train --data {args.dataset} --labels {labels} --batch-size {config.batch_size}`")


# ---- bnfuse export ----


def _add_export(commands) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "Write a finished dataset as WebDataset tar shards, as Hugging Face parquet, or as a plain image folder.",
    )
    parser.add_argument("dataset", type=Path, metavar="DIR", help="the dataset")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--labels",
        metavar="WHICH",
        help="take along what `bnfuse relabel` wrote: relabel, from DIR; or the folder that it was given. Plain labels become "
        "the logits of each image, views are copied beside the images (default: the dataset's own soft labels, if any)",
    )
    parser.add_argument("--images-per-shard", type=int, default=2000, metavar="N", help="images a file (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images in the shards (default 0)")


def _export(args) -> None:
    done = export(
        args.dataset,
        args.out,
        args.format,
        labels=None if args.labels is None else _open_labels(args.dataset, args.labels),
        images_per_shard=args.images_per_shard,
        seed=args.seed,
        progress=True,
    )
    print(f"{done.images} images in {done.files} files, {readable_bytes(done.bytes)}, read back and right: {done.out}")
    if args.labels is None and (args.dataset / RELABEL / LABELS).exists():
        print(f"the labels in {args.dataset / RELABEL} are not among them: --labels relabel takes them along")


# ---- bnfuse demo, bnfuse doctor ----


def _add_demo(commands) -> None:
    parser = _command(
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
    _command(
        commands,
        "doctor",
        lambda args: print(report()),
        "Print versions, backends with the reason why one is missing, threads and instruction sets.",
    )


# ---- flags that several subcommands share ----


def _add_listing(parser, flag: str, listing: Callable[[], str], of: str) -> None:
    parser.add_argument(flag, action=_List, listing=listing, help=f"show the named settings for {of}, and end")


class _List(argparse.Action):
    """Like --help, so that it needs none of the required arguments."""

    def __init__(self, option_strings, dest, listing, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)
        self.listing = listing

    def __call__(self, parser, *_) -> None:
        print(self.listing())
        parser.exit()


def _add_teacher(parser, required: bool = True) -> None:
    parser.add_argument("--teacher", required=required, metavar="MODEL", help="the pretrained network, see below")
    parser.add_argument("--weights", metavar="FILE|NAME", help="its weights, see below")
    parser.add_argument("--num-classes", type=int, metavar="K", help="its outputs, where the weights do not tell")
    _add_image_flags(parser)


def _add_more_teachers(parser) -> None:
    parser.add_argument("--more-teachers", nargs="+", default=[], metavar="MODEL", help="further networks, see --teacher-plan")
    parser.add_argument("--more-weights", nargs="+", default=[], metavar="FILE|NAME", help="their weights, in order")
    parser.add_argument(
        "--more-statistics", nargs="+", type=Path, default=[], metavar="FILE", help="their statistics, in order"
    )


def _load_more_teachers(args) -> list[tuple[Teacher, ClassStatistics | None]]:
    count = len(args.more_teachers)
    for flag, given in (("--more-weights", args.more_weights), ("--more-statistics", args.more_statistics)):
        if len(given) not in (0, count):
            raise InputError(f"{flag} goes with --more-teachers, one each: got {len(given)} for {count}")
    pairs = []
    for k, model in enumerate(args.more_teachers):
        weights = args.more_weights[k] if args.more_weights else None
        teacher = load_teacher(model, weights=weights, num_classes=args.num_classes, preprocessing=_preprocessing(args))
        teacher.model.to(_device(args))
        pairs.append((teacher, ClassStatistics.load(args.more_statistics[k]) if args.more_statistics else None))
    return pairs


def _add_image_flags(parser) -> None:
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one number for both")
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help="of the pixels in [0, 1], one a channel")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="of the pixels in [0, 1], one a channel")
    parser.add_argument("--download", action="store_true", help="let torchvision download CIFAR-10 if it is not there")


def _add_kernels(parser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="which kernels run (default auto)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="images that are in the network together, as many as memory allows (default all); the batch stays --batch-size",
    )
    _add_device(parser)


def _add_device(parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default cuda where there is one)")


def _size(args) -> tuple[int, int] | None:
    if args.image_size is None:
        return None
    if len(args.image_size) > 2:
        raise InputError(f"--image-size takes one or two numbers, got {args.image_size}")
    return args.image_size[0], args.image_size[-1]


def _channels(args) -> int | None:
    return None if args.mean is None else len(args.mean)


def _preprocessing(args) -> Preprocessing | None:
    given = {"--image-size": args.image_size, "--mean": args.mean, "--std": args.std}
    if all(value is None for value in given.values()):
        return None
    if missing := [flag for flag, value in given.items() if value is None]:
        if missing == ["--mean", "--std"]:
            return None  # the size alone resizes images; mean and std are the network's or the dataset's own
        raise InputError(f"--image-size, --mean and --std go together; {', '.join(missing)} is missing")
    return Preprocessing(_size(args), tuple(args.mean), tuple(args.std))


def _load_data(args):
    return load_dataset(args.data, image_size=_size(args), channels=_channels(args), download=args.download)


def _load_teacher(args) -> Teacher:
    teacher = load_teacher(args.teacher, weights=args.weights, num_classes=args.num_classes, preprocessing=_preprocessing(args))
    teacher.model.to(_device(args))
    return teacher


def _device(args) -> torch.device:
    try:
        device = choose_device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises AssertionError
        raise InputError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    return device
