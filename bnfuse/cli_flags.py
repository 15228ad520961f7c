"""What several subcommands share: how one is added, their common flags, and what is loaded as these say."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from . import models
from .backends import BACKENDS
from .datasets import SPEC_GRAMMAR as DATASET_GRAMMAR
from .datasets import load_dataset
from .distributed import choose_device
from .errors import InputError
from .labels import RELABEL, Labels
from .models import SPEC_GRAMMAR, Teacher
from .preprocessing import Preprocessing
from .statistics import ClassStatistics

GRAMMARS = f"A dataset is named by one of\n{textwrap.indent(DATASET_GRAMMAR, '  ')}\n{SPEC_GRAMMAR}"


def add_command(commands, name: str, run, help: str, epilog: str = "") -> argparse.ArgumentParser:
    """A subcommand, which calls `run` with the arguments."""
    parser = commands.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_teacher(parser, required: bool = True) -> None:
    parser.add_argument("--teacher", required=required, metavar="MODEL", help="the pretrained network, see below")
    parser.add_argument("--weights", metavar="FILE|NAME", help="its weights, see below")
    parser.add_argument("--num-classes", type=int, metavar="K", help="its outputs, where the weights do not tell")
    add_image_flags(parser)


def add_more_teachers(parser) -> None:
    parser.add_argument("--more-teachers", nargs="+", default=[], metavar="MODEL", help="further networks, see --teacher-plan")
    parser.add_argument("--more-weights", nargs="+", default=[], metavar="FILE|NAME", help="their weights, in order")
    parser.add_argument(
        "--more-statistics", nargs="+", type=Path, default=[], metavar="FILE", help="their statistics, in order"
    )


def load_more_teachers(args) -> list[tuple[Teacher, ClassStatistics | None]]:
    count = len(args.more_teachers)
    for flag, given in (("--more-weights", args.more_weights), ("--more-statistics", args.more_statistics)):
        if len(given) not in (0, count):
            raise InputError(f"{flag} goes with --more-teachers, one each: got {len(given)} for {count}")
    pairs = []
    for k, model in enumerate(args.more_teachers):
        weights = args.more_weights[k] if args.more_weights else None
        teacher = _teacher(args, model, weights)
        pairs.append((teacher, ClassStatistics.load(args.more_statistics[k]) if args.more_statistics else None))
    return pairs


def add_image_flags(parser) -> None:
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one number for both")
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help="of the pixels in [0, 1], one a channel")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="of the pixels in [0, 1], one a channel")
    parser.add_argument("--download", action="store_true", help="let torchvision download CIFAR-10 if it is not there")


def add_kernels(parser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="which kernels run (default auto)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="images that are in the network together, as many as memory allows (default all); the batch stays --batch-size",
    )
    add_device(parser)


def add_device(parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default cuda where there is one)")


def size(args) -> tuple[int, int] | None:
    """(height, width), where it was given."""
    if args.image_size is None:
        return None
    if len(args.image_size) > 2:
        raise InputError(f"--image-size takes one or two numbers, got {args.image_size}")
    return args.image_size[0], args.image_size[-1]


def channels(args) -> int | None:
    return None if args.mean is None else len(args.mean)


def preprocessing(args) -> Preprocessing | None:
    given = {"--image-size": args.image_size, "--mean": args.mean, "--std": args.std}
    if all(value is None for value in given.values()):
        return None
    if missing := [flag for flag, value in given.items() if value is None]:
        if missing == ["--mean", "--std"]:
            return None  # the size alone resizes images; mean and std are the network's or the dataset's own
        raise InputError(f"--image-size, --mean and --std go together; {', '.join(missing)} is missing")
    return Preprocessing(size(args), tuple(args.mean), tuple(args.std))


def load_data(args):
    return load_dataset(args.data, image_size=size(args), channels=channels(args), download=args.download)


def load_teacher(args) -> Teacher:
    return _teacher(args, args.teacher, args.weights)


def _teacher(args, model: str, weights: str | None) -> Teacher:
    """On the device, with the size, mean and std that the flags give."""
    given = dict(num_classes=args.num_classes, preprocessing=preprocessing(args), image_size=size(args))
    teacher = models.load_teacher(model, weights=weights, **given)
    teacher.model.to(device(args))
    return teacher


def load_subclass_teacher(args) -> Teacher | None:
    if args.subclass_teacher is None:
        if args.subclass_weights is not None:
            raise InputError(f"--subclass-weights {args.subclass_weights} are for --subclass-teacher, which is missing")
        return None
    return _teacher(args, args.subclass_teacher, args.subclass_weights)


def device(args) -> torch.device:
    try:
        chosen = choose_device(args.device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises AssertionError
        raise InputError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    return chosen


def open_labels(dataset: Path, which: str) -> Labels:
    """Those beside the dataset's images, or in another folder."""
    return Labels(dataset / RELABEL if which == "relabel" else which)


def add_listing(parser, flag: str, listing: Callable[[], str], of: str) -> None:
    """A flag that prints what `listing` returns, the named settings for the flag `of`, and ends."""
    parser.add_argument(flag, action=_List, listing=listing, help=f"show the named settings for {of}, and end")


class _List(argparse.Action):
    """Like --help, so that it needs none of the required arguments."""

    def __init__(self, option_strings, dest, listing, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)
        self.listing = listing

    def __call__(self, parser, *_) -> None:
        print(self.listing())
        parser.exit()
