"""Class statistics at scale: read when needed, in bounded memory, the same numbers as all at once."""

import gc
import re
from pathlib import Path

import pytest
import torch
from networks import Chains, settle

from bnfuse import ClassStatistics, InputError, Matcher, record
from bnfuse.site_moments import SiteMoments
from bnfuse.targets import Targets

CLASSES = 5


@pytest.fixture(scope="module")
def statistics():
    torch.manual_seed(0)
    images, labels = torch.randn(60, 3, 6, 5), torch.arange(60) % CLASSES
    return record(settle(Chains()), [(images, labels)], CLASSES, minimum_images=1)


@pytest.fixture
def file(statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


@pytest.mark.parametrize("classes", [None, [3], [0, 1, 2], [4, 0, 3, 1], [1, 2, 4]])
def test_rows_of_a_file_are_those_of_memory(statistics, file, classes):
    loaded = ClassStatistics.load(file)
    for a, b in zip(loaded.moments(classes=classes), statistics.moments(classes=classes)):
        assert a.equal(b) and a.dtype == torch.float64
    whole = statistics.moments()
    for a, b in zip(loaded.moments(classes=classes), whole):
        assert a.equal(b if classes is None else b[classes])
    names = list(loaded.sites)[:0:-1]
    for a, b in zip(loaded.moments(classes=classes, names=names), statistics.moments(classes=classes, names=names)):
        assert a.equal(b)
    for a, b in zip(loaded.moments(per_class=False), statistics.moments(per_class=False)):
        assert a.equal(b) and len(a) == 1
    assert loaded.site_channels == statistics.site_channels and loaded.digest() == statistics.digest()


def test_a_file_can_be_written_over_by_what_was_read_from_it(statistics, file):
    loaded = ClassStatistics.load(file)
    loaded.save(file)
    assert ClassStatistics.load(file).digest() == statistics.digest()
    assert loaded.digest() == statistics.digest()  # what was opened stays


def test_a_file_that_is_cut_while_it_is_open(file):
    loaded = ClassStatistics.load(file)
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 9)
    with pytest.raises(InputError, match="has become shorter"):
        loaded.digest()


def test_a_file_whose_tables_do_not_fit_is_refused_at_once(statistics, tmp_path):
    site = next(iter(statistics.sites))
    sites = {**statistics.sites, site: SiteMoments.empty(CLASSES + 1, 4)}
    ClassStatistics(sites, statistics.images, statistics.teacher).save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=rf"is damaged: site '{site}' is not \[5, C\]"):
        ClassStatistics.load(tmp_path / "s.safetensors")


def test_targets_are_the_same_wherever_they_are_held(file):
    statistics = ClassStatistics.load(file)
    table = Matcher.from_statistics(statistics)
    batches = [[3, 3, 1], [1], [1, 3], [4, 4, 0], [0, 2, 4]]
    for budget in (2**30, 0):
        targets = Targets.class_wise(statistics, [4, 0, 2, 3, 1], at_once=3, budget=budget, site_weights={"bn0": 3.0})
        memory = targets.matcher.target_mean.data_ptr()
        assert len(targets.matcher.target_mean) == (5 if budget else 3)
        for classes in batches:
            rows = torch.tensor(targets.rows(classes))
            assert [rows[0] == row for row in rows] == [classes[0] == k for k in classes]  # one group a class
            assert targets.matcher.target_mean[rows].equal(table.target_mean[classes])
            assert targets.matcher.target_var[rows].equal(table.target_var[classes])
        assert targets.matcher.target_mean.data_ptr() == memory


def test_one_row_makes_the_batch_one_group(statistics):
    for matcher in (Matcher.from_statistics(statistics, per_class=False), Matcher.from_running(settle(Chains()))):
        assert Targets.pooled(matcher).rows([2, 2, 4]) == [0, 0, 0]


def resident(reset: bool = False) -> int:
    """Bytes of this process that are resident now; with `reset` the peak starts here. `peak` is the most since."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture(scope="module")
def thousand_classes(tmp_path_factory):
    """1,000 classes and a tenth of a ResNet-50's channels: 42 MB."""
    path = tmp_path_factory.mktemp("scale") / "s.safetensors"
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for s in range(8):
        mean, m2 = torch.randn(2, 1000, 332, generator=generator, dtype=torch.float64)
        sites[f"layer{s}"] = SiteMoments(torch.full((1000,), 50), mean, m2.square())
    ClassStatistics(sites, torch.full((1000,), 50), "teacher", class_names=[str(k) for k in range(1000)]).save(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_classes(thousand_classes):
    size, table = thousand_classes.stat().st_size, 2 * 4 * 1000 * 8 * 332
    assert size > 42e6

    def peak_of(work) -> int:
        gc.collect()
        before = resident(reset=True)
        work()
        return _status("VmHWM") - before

    def one_unit():
        statistics = ClassStatistics.load(thousand_classes)
        targets = Targets.class_wise(statistics, range(1000), at_once=10, budget=0)
        for first in range(0, 1000, 100):
            targets.rows(range(first, first + 10))
        statistics.digest()

    def whole_run():
        Targets.class_wise(ClassStatistics.load(thousand_classes), range(1000), at_once=10)

    one_unit()  # what is loaded once
    assert peak_of(one_unit) < 0.3 * size  # digest() has two sites in memory, a quarter
    assert peak_of(whole_run) < table + 0.3 * size  # the float32 table, and 64 rows in float64


def test_recording_touches_the_classes_of_a_batch_alone():
    """Rows of absent classes keep their very bits, even where arithmetic on them would not."""
    site = SiteMoments.empty(1000, 4)
    site.mean[7] = float("inf")
    x = torch.randn(6, 4, 3)
    site.add_batch(x, torch.tensor([3, 900, 3, 3, 900, 3]))
    assert (site.count > 0).nonzero().flatten().tolist() == [3, 900] and site.mean[7].isinf().all() and not site.m2[7].any()
    torch.testing.assert_close(site.mean[900], x[[1, 4]].double().mean((0, 2)), rtol=1e-14, atol=1e-14)
