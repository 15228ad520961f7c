"""The suite's options, what its cases share, and the files that it leaves.

    pytest benchmarks                               # or `make bench`: results/operators.json, steps.json, memory.json
    pytest benchmarks --quick                       # or `make bench-quick`: a part of it, results/quick.json
    pytest benchmarks --device cuda                 # the same cases on a GPU; its name goes into the files' names
    pytest benchmarks --compile-for resnet50        # torch.compile's rivals for one network alone: they take most of the time
    pytest benchmarks/test_operators.py --layout channels_last      # results/operators_channels_last.json

A suite's file appears only when every one of its cases has run and passed.
"""

from __future__ import annotations

import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median

import pytest
import torch
from contenders import precompile
from report import terminal_tables
from results_file import file_name, write_result
from sites import DTYPES, LAYOUTS, NETWORKS, all_sites, quick_sites
from summary import SUMMARIES, with_sums
from timing import OPERATOR_LIMITS, QUICK_STEP_LIMITS, STEP_LIMITS, CudaInstant, Limits, Machine, bandwidth

DEFAULT_THREADS = 2
GPU_COMPILERS = 8  # processes that compile for a GPU side by side: each holds a site of some GB on it


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    device: torch.device
    threads: int
    dtype: torch.dtype
    layout: str
    quick: bool
    networks: tuple[str, ...]
    batch: int | None  # images, for sites and steps; None takes each network's own
    compile_for: tuple[str, ...]  # the networks that torch.compile's rivals run of

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]

    @property
    def tensors(self) -> tuple[torch.device, torch.dtype, torch.memory_format]:
        return self.device, self.dtype, self.memory_format

    @property
    def limits(self) -> Limits:
        """Of one operator in one direction."""
        return OPERATOR_LIMITS[self.device.type]

    @property
    def step_limits(self) -> Limits:
        return QUICK_STEP_LIMITS if self.quick else STEP_LIMITS[self.device.type]

    def step_batch(self, network: str) -> int:
        """Images of a step."""
        return self.batch or (NETWORKS[network].quick_step_batch if self.quick else NETWORKS[network].step_batch)

    def describe(self) -> dict:
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch."), "layout": self.layout}

    def file_name(self, suite: str) -> str:
        return file_name(
            suite,
            self.device,
            f"threads{self.threads}" if self.device.type == "cpu" and self.threads != DEFAULT_THREADS else None,
            str(self.dtype).removeprefix("torch.") if self.dtype != torch.float32 else None,
            self.layout if self.layout != "contiguous" else None,
            f"batch{self.batch}" if self.batch else None,
        )


@dataclass
class Record:
    """The cases of each suite so far, and the suites that will not be written."""

    cases: dict[str, list[dict]] = field(default_factory=lambda: {name: [] for name in SUMMARIES})
    copies: list[float] = field(default_factory=list)  # seconds of every copy of the floor
    incomplete: set[str] = field(default_factory=set)
    shown: dict[str, str] = field(default_factory=dict)  # what the terminal ends with, by title


SETTINGS, RECORD = pytest.StashKey[Settings](), pytest.StashKey[Record]()


def pytest_addoption(parser):
    group = parser.getgroup("bnfuse benchmarks")
    group.addoption("--device", default="cpu", help="cpu or cuda (default cpu)")
    group.addoption("--threads", type=int, default=DEFAULT_THREADS, help=f"of PyTorch's pool (default {DEFAULT_THREADS})")
    group.addoption("--dtype", default="float32", choices=list(DTYPES), help="of activations and weights (default float32)")
    group.addoption(
        "--layout", default="contiguous", choices=list(LAYOUTS), help="of sites and of the memory's rivals (default contiguous)"
    )
    group.addoption("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="some of them (default all)")
    group.addoption(
        "--compile-for",
        nargs="*",
        default=list(NETWORKS),
        choices=list(NETWORKS),
        help="who gets compiled rivals (default all)",
    )
    group.addoption("--batch", type=int, help="images, for sites and steps alike (default each network's own)")
    group.addoption("--quick", action="store_true", help="some of the sites and steps, in less than three minutes")


def pytest_configure(config):
    option = config.option
    device = _device(option.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not 1 <= option.threads <= cores:
        raise pytest.UsageError(f"--threads must be from 1 to the {cores} core(s) of this process, got {option.threads}")
    torch.set_num_threads(option.threads)
    if option.benchmark_disable:
        raise pytest.UsageError("--benchmark-disable leaves nothing to compare")
    if option.batch is not None and option.batch < 1:
        raise pytest.UsageError(f"--batch must be positive, got {option.batch}")
    config.stash[SETTINGS] = Settings(
        device,
        option.threads,
        DTYPES[option.dtype],
        option.layout,
        option.quick,
        tuple(option.networks),
        option.batch,
        tuple(option.compile_for),
    )
    config.stash[RECORD] = Record()
    # No case is cut off; of pytest-benchmark's table what belongs to medians is enough.
    config.option.timeout = 0
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    config.option.benchmark_sort = "fullname"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device")
    return device


def pytest_generate_tests(metafunc):
    """Sites and networks as parameters; a site's directions follow each other and share its verified case."""
    settings = metafunc.config.stash[SETTINGS]
    if "verified" in metafunc.fixturenames:
        counts = _counts(metafunc.config)
        compiled = {site: not networks.keys().isdisjoint(settings.compile_for) for site, networks in counts.items()}
        sites = quick_sites(counts) if settings.quick else compiled  # whether to compile for it
        directions = ["forward", "backward"]  # on a GPU the two together are their sum, see summary.with_sums
        if settings.device.type == "cpu":
            directions = ["both"] if settings.quick else [*directions, "both"]
        metafunc.parametrize("verified", sites.items(), ids=[str(site) for site in sites], indirect=True, scope="module")
        metafunc.parametrize("direction", directions)
    if "network" in metafunc.fixturenames:
        memory = metafunc.module.__name__ == "test_memory"
        quick = ["resnet20"] if memory else ["resnet20", "resnet18"]
        metafunc.parametrize("network", [name for name in settings.networks if name in quick or not settings.quick])


_COUNTS = pytest.StashKey[dict]()


def _counts(config) -> dict:
    if _COUNTS not in config.stash:
        settings = config.stash[SETTINGS]
        config.stash[_COUNTS] = all_sites(settings.networks, settings.batch)
    return config.stash[_COUNTS]


@pytest.fixture(scope="session")
def settings(pytestconfig) -> Settings:
    return pytestconfig.stash[SETTINGS]


@pytest.fixture(scope="session")
def record(pytestconfig) -> Record:
    return pytestconfig.stash[RECORD]


@pytest.fixture(scope="session")
def counts(pytestconfig) -> dict:
    return _counts(pytestconfig)


@pytest.fixture(scope="session")
def machine(settings) -> Machine:
    return Machine(settings.device)


@pytest.fixture(scope="session")
def compiler_cache(request, settings) -> None:
    """Compiles what the chosen sites need, side by side: one after the other it would take as long as the rest."""
    chosen = (item.callspec.params["verified"] for item in request.session.items if "verified" in item.fixturenames)
    sites = [site for site, compiled in dict.fromkeys(chosen) if compiled]
    arguments = (settings.device, settings.dtype, settings.layout, settings.threads)
    processes = settings.threads if settings.device.type == "cpu" else min(GPU_COMPILERS, os.cpu_count())
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for done in [pool.submit(precompile, site, *arguments) for site in sites]:
            done.result()


# ---- which clock, and what is written ----


def _suite(nodeid: str) -> str:
    return nodeid.split("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")


def pytest_collection_modifyitems(config, items):
    if config.stash[SETTINGS].device.type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=CudaInstant))
    # Cases picked by hand are timed and printed, but are not the suite; nor are some networks on the CPU.
    config.stash[RECORD].incomplete.update(_suite(arg) for arg in config.args if "::" in arg)
    settings = config.stash[SETTINGS]
    if settings.device.type == "cpu" and not set(NETWORKS) == {*settings.networks} == {*settings.compile_for}:
        config.stash[RECORD].incomplete.update(SUMMARIES)


def pytest_deselected(items):
    for item in items:
        item.config.stash[RECORD].incomplete.add(_suite(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if not report.passed:
        item.config.stash[RECORD].incomplete.add(_suite(item.nodeid))
    return report


def pytest_sessionfinish(session, exitstatus):
    """Summarises what was timed, and writes what is complete."""
    config = session.config
    settings, record = config.stash[SETTINGS], config.stash[RECORD]
    suites = {name: cases for name, cases in record.cases.items() if cases}
    if settings.device.type == "cuda" and "operators" in suites:
        suites["operators"] = with_sums(suites["operators"])
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        record.incomplete.update(suites)
    if settings.quick:
        complete = not record.incomplete and suites.keys() == SUMMARIES.keys()
        files = {"quick": suites} if suites else {}
    else:
        files = {name: {name: cases} for name, cases in suites.items()}
    for name, content in files.items():
        summary = {key: value for suite, cases in content.items() for key, value in SUMMARIES[suite](cases).items()}
        if "operators" in content:
            summary["copy_gb_per_second"] = bandwidth(median(record.copies)) / 1e9
        figures = {"settings": settings.describe(), "summary": summary, **content}
        title = f"{name}: not written, for not every case ran and passed"
        if complete if settings.quick else name not in record.incomplete:
            command = f"pytest {shlex.join(sys.argv[1:])}"
            title = str(write_result(settings.file_name(name), command, device=settings.device, **figures))
        record.shown[title] = terminal_tables({**figures, "threads": settings.threads})


def pytest_terminal_summary(terminalreporter, config):
    for title, tables in config.stash[RECORD].shown.items():
        terminalreporter.section(title)
        terminalreporter.write_line(tables)
