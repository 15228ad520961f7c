"""bnfuse: turns a private image dataset into a synthetic one that can be published in its place.

record → synthesize → train → audit, each a function here and a subcommand of the command line; `fuse` and `Matcher` are the
parts that a loop of one's own needs.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bnfuse")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+uninstalled"

from .audit import AuditResult, audit
from .datasets import load_dataset
from .errors import BackendError, BnfuseError, InputError
from .exporting import export
from .fusion import fuse
from .labels import Labels
from .manifest import verify
from .matching import Matcher, group_by_class
from .models import Teacher, freeze, load_teacher
from .plans import SynthesisConfig
from .preprocessing import Preprocessing
from .presets import preset
from .recipes import recipe
from .relabelling import RelabelConfig, relabel
from .repair import repair
from .statistics import ClassStatistics, record
from .synthesis import synthesize
from .training import TrainConfig, evaluate, train

__all__ = [
    "AuditResult",
    "BackendError",
    "BnfuseError",
    "ClassStatistics",
    "InputError",
    "Labels",
    "Matcher",
    "Preprocessing",
    "RelabelConfig",
    "SynthesisConfig",
    "Teacher",
    "TrainConfig",
    "audit",
    "evaluate",
    "export",
    "freeze",
    "fuse",
    "group_by_class",
    "load_dataset",
    "load_teacher",
    "preset",
    "recipe",
    "record",
    "relabel",
    "repair",
    "synthesize",
    "train",
    "verify",
]
