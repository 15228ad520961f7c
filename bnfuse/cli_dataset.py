"""The subcommands for a synthetic dataset that is there: audit, verify, relabel, export."""

from __future__ import annotations

from pathlib import Path

from . import cli_flags as flags
from . import recipes
from .audit import MEASURES, audit
from .audit.context import BUDGETS, NOISE
from .audit.running import command_line
from .audit.summary import verdict_lines
from .configs import add_flags, given_flags
from .datasets import as_spec, load_dataset
from .errors import InputError
from .estimate import readable_bytes
from .exporting import FORMATS, export
from .labels import RELABEL, is_labels, label_problems
from .manifest import inspect, is_store, some
from .models import SPEC_GRAMMAR
from .relabelling import RelabelConfig, relabel
from .repair import repair
from .statistics import ClassStatistics

# ---- bnfuse audit ----


def add_audit(commands) -> None:
    parser = flags.add_command(
        commands,
        "audit",
        _audit,
        "Measure what a synthetic dataset gives away of the private images, with controls, and write a report. Stopped and "
        "started again, it continues.",
        flags.GRAMMARS,
    )
    parser.add_argument("--private", required=True, metavar="DATASET", help="what the synthetic images were made from")
    parser.add_argument("--synthetic", required=True, metavar="DATASET", help="what is to be published")
    parser.add_argument(
        "--heldout", metavar="DATASET", help="real images like the private ones, but not among them: the baseline"
    )
    flags.add_teacher(parser, required=False)
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="what `bnfuse record` wrote")
    parser.add_argument("--budget", choices=BUDGETS, default="quick", help="how long attacks try (default quick, a first look)")
    names = ", ".join(MEASURES)
    parser.add_argument("--only", choices=MEASURES, nargs="+", metavar="NAME", help=f"of {names} (default what can be made)")
    parser.add_argument(
        "--noise",
        type=float,
        default=NOISE,
        metavar="S",
        help=f"standard deviation of the noised originals' noise, of pixels in [0, 1] (default {NOISE})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="DIR", help="folder (default runs/audit)")
    flags.add_device(parser)


def _audit(args) -> None:
    if is_store(args.private) and not is_store(args.synthetic):
        raise InputError(
            f"--private {args.private} was made by bnfuse, and --synthetic {args.synthetic} was not: exchange them, or nothing "
            "would be said of what is to be published"
        )
    teacher = None if args.teacher is None else flags.load_teacher(args)
    size, channels = flags.size(args), flags.channels(args)
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
        device=flags.device(args),
        seed=args.seed,
        command=command_line(**{name: value for name, value in vars(args).items() if name not in unneeded}),
    )
    print(verdict_lines(result.findings))
    print(f"the report without private images: {result.public_report}")
    print(f"the report, which shows private images: {result.report}")


# ---- bnfuse verify ----


def add_verify(commands) -> None:
    parser = flags.add_command(
        commands,
        "verify",
        _verify,
        "Hold every file of a synthetic dataset, and of its labels, against its hash; make again what is damaged.",
        SPEC_GRAMMAR,
    )
    parser.add_argument(
        "data",
        type=Path,
        metavar="DIR",
        help="the dataset, finished or not, or a folder of labels; exit status 1 if anything is wrong",
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
    flags.add_teacher(parser, required=False)
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="what `bnfuse record` wrote")
    flags.add_more_teachers(parser)
    flags.add_kernels(parser)


def _verify(args) -> int:
    if args.repair and args.teacher is None:
        raise InputError("--repair makes images again: give the --teacher and --statistics that the dataset was made from")
    if not args.repair:
        problems = [] if is_labels(args.data) else inspect(args.data, progress=True).problems
        for labels in (args.data, args.data / RELABEL):
            if is_labels(labels):
                problems += label_problems(labels)
        print("\n".join(problems) or f"{args.data}: every file is as it was written, and nothing is missing")
        return bool(problems)
    statistics = None if args.statistics is None else ClassStatistics.load(args.statistics)
    teacher = flags.load_teacher(args)
    result = repair(
        teacher,
        statistics,
        args.data,
        accept_changes=args.accept_changes,
        device=args.device,
        backend=args.backend,
        micro_batch=args.micro_batch,
        more_teachers=flags.load_more_teachers(args),
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


def add_relabel(commands) -> None:
    parser = flags.add_command(
        commands,
        "relabel",
        _relabel,
        "Label a finished dataset with a teacher: each image, or many augmented views of each. Stopped and started again, it "
        "continues.",
        SPEC_GRAMMAR,
    )
    parser.add_argument("dataset", type=Path, metavar="DIR", help="the dataset")
    flags.add_teacher(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"folder of the labels (default {RELABEL} in DIR)")
    parser.add_argument(
        "--outputs",
        type=int,
        nargs="+",
        metavar="K",
        help="the teacher's output for each class of the dataset, where the names of its classes do not tell",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)")
    parser.add_argument("--recipe", metavar="NAME", help="begin from the views of this recipe, see --list-recipes")
    flags.add_listing(parser, "--list-recipes", recipes.listing, "--recipe")
    flags.add_device(parser)
    add_flags(parser, RelabelConfig)


def _relabel(args) -> None:
    given = given_flags(RelabelConfig, args)
    config = RelabelConfig(**given) if args.recipe is None else recipes.recipe(args.recipe).relabel_config(**given)
    teacher = flags.load_teacher(args)
    done = relabel(
        args.dataset, teacher, config, out=args.out, outputs=args.outputs, device=flags.device(args), workers=args.workers
    )
    rate = f" in {done.seconds:.0f} s" if done.made else ", which were there already"
    print(f"labels of {done.views:,} views, {done.made:,} made now{rate}, {readable_bytes(done.bytes)}: {done.out}")
    labels = RELABEL if args.out is None else args.out
    how = f"--batch-size {config.batch_size}" if args.recipe is None else f"--recipe {args.recipe}"
    print(f"learn them with `bnfuse train --data {as_spec(args.dataset)} --labels {labels} {how}`")


# ---- bnfuse export ----


def add_export(commands) -> None:
    parser = flags.add_command(
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
        labels=None if args.labels is None else flags.open_labels(args.dataset, args.labels),
        images_per_shard=args.images_per_shard,
        seed=args.seed,
        progress=True,
    )
    print(f"{done.images} images in {done.files} files, {readable_bytes(done.bytes)}, read back and right: {done.out}")
    if args.labels is None and is_labels(args.dataset / RELABEL):
        print(f"the labels in {args.dataset / RELABEL} are not among them: --labels relabel takes them along")
