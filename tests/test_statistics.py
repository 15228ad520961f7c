"""Recorded statistics are exact, merge exactly, and refuse what does not fit."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Chains, Shared, settle

from bnfuse import ClassStatistics, InputError, Preprocessing, freeze, record
from bnfuse.models import Teacher, batchnorm_layers, build_model
from bnfuse.statistics import SiteMoments

CLASSES = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settle(Chains())


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return torch.randn(40, 3, 6, 5) + 3, torch.randint(0, CLASSES, (40,))


def pixels(data):
    """The images as a teacher's preprocessing takes them, in [0, 1]."""
    return data[0].sigmoid(), data[1]


def batches(images, labels, size=7):
    return list(zip(images.split(size), labels.split(size)))


def take(model, images, labels, **options):
    return record(model, batches(images, labels), CLASSES, minimum_images=1, **options)


def inputs_of(model, images):
    """Every BatchNorm input as float64 [N, C, positions]."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, inputs, name=name: seen.__setitem__(name, inputs[0].double().reshape(*inputs[0].shape[:2], -1))
        )
        for name, layer in batchnorm_layers(model).items()
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


def test_pooled_moments_are_those_of_all_images_at_once(model, data):
    statistics = take(model, *data)
    # One batch or many: convolutions may round differently, statistics of one pass may not.
    assert statistics.images.tolist() == torch.bincount(data[1]).tolist()
    for name, x in inputs_of(model, data[0]).items():
        site = statistics.sites[name]
        for k in range(CLASSES):
            of_class = x[data[1] == k].transpose(0, 1).flatten(1)  # [C, elements]
            assert site.count[k] == of_class.shape[1]
            torch.testing.assert_close(site.mean[k], of_class.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(site.m2[k] / site.count[k], of_class.var(1, correction=0), rtol=1e-5, atol=1e-9)


def test_float64_network_gives_float64_exactness(data):
    model = settle(Chains()).double()
    images = data[0].double()
    statistics = take(model, images, data[1])
    for name, x in inputs_of(model, images).items():
        for k in range(CLASSES):
            of_class = x[data[1] == k].transpose(0, 1).flatten(1)
            torch.testing.assert_close(statistics.sites[name].mean[k], of_class.mean(1), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                statistics.sites[name].m2[k], of_class.var(1, correction=0) * of_class.shape[1], rtol=1e-11, atol=1e-11
            )


def test_two_recordings_merge_into_one(data):
    model = settle(Chains()).double()
    images, labels = data[0].double(), data[1]
    whole = take(model, images, labels, dataset="all")
    order = torch.tensor([*range(0, 40, 2), *range(1, 40, 2)])  # every class in both halves
    first, second = (take(model, images[half], labels[half], dataset="all") for half in order.split(20))
    for merged in (first.merge(second), second.merge(first)):
        assert merged.images.equal(whole.images) and merged.dataset == "all"
        for name, site in whole.sites.items():
            assert merged.sites[name].count.equal(site.count)
            torch.testing.assert_close(merged.sites[name].mean, site.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(merged.sites[name].m2, site.m2, rtol=1e-10, atol=1e-10)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(-1e4, 1e4), st.integers(0, 2**31))
def test_moments_merge_in_any_partition(sizes, offset, seed):
    x = torch.randn(sum(sizes), 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset
    site = SiteMoments.empty(1, 4)
    for part in x.split(sizes):
        other = SiteMoments.empty(1, 4)
        if len(part):
            other.add_batch(part, torch.zeros(len(part), dtype=torch.int64))
        site = site.merge(other)
    assert site.count.item() == 3 * len(x)
    if len(x):
        flat = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(site.mean[0], flat.mean(1), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(site.m2[0] / site.count, flat.var(1, correction=0), rtol=1e-7, atol=1e-9)


def test_all_classes_pooled_are_one_class(model, data):
    statistics = take(model, *data)
    one = record(model, batches(data[0], torch.zeros_like(data[1])), 1)
    for pooled, single in zip(statistics.moments(per_class=False), one.moments()):
        assert pooled.shape == (1, sum(statistics.site_channels.values()))
        torch.testing.assert_close(pooled, single, rtol=1e-10, atol=1e-10)


def test_a_layer_that_runs_twice_is_two_sites(data):
    statistics = take(settle(Shared()), *data)
    assert list(statistics.sites) == ["bn", "bn#2"]


def test_teacher_normalises_pixels(model):
    preprocessing = Preprocessing((6, 5), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    teacher = Teacher(model, "chains", 5, preprocessing)
    pixels, labels = torch.rand(40, 3, 6, 5), torch.arange(40) % CLASSES
    with_teacher = take(teacher, pixels, labels, outputs=[4, 0, 2])
    by_hand = take(model, preprocessing.normalize(pixels), labels)
    assert with_teacher.preprocessing == preprocessing and by_hand.preprocessing is None
    assert all(a.equal(b) for a, b in zip(with_teacher.moments(), by_hand.moments()))


def test_file_keeps_everything(model, data, tmp_path):
    statistics = take(
        model,
        *pixels(data),
        preprocessing=Preprocessing((6, 5), (0, 0, 0), (1, 1, 1)),
        dataset="d",
        class_names=["../a", "b/c", "ü"],
        outputs=[4, 0, 2],
    )
    statistics.save(tmp_path / "deep" / "s.safetensors")
    loaded = ClassStatistics.load(tmp_path / "deep" / "s.safetensors", teacher=model, num_classes=CLASSES)
    assert (loaded.dataset, loaded.class_names, loaded.outputs) == ("d", ["../a", "b/c", "ü"], [4, 0, 2])
    assert loaded.preprocessing == statistics.preprocessing and loaded.images.equal(statistics.images)
    assert list(loaded.sites) == list(statistics.sites) and loaded.digest() == statistics.digest()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.safetensors"]
    assert loaded.sites["bn0"].mean.dtype == torch.float64


def test_another_network_or_preprocessing_or_file_is_refused(model, data, tmp_path):
    path = tmp_path / "s.safetensors"
    statistics = take(model, *pixels(data), preprocessing=Preprocessing((6, 5), (0, 0, 0), (1, 1, 1)))
    statistics.save(path)
    with pytest.raises(InputError, match="teacher is"):
        ClassStatistics.load(path, teacher=settle(Chains(), seed=9))
    with pytest.raises(InputError, match="number of classes is 3, expected 10"):
        ClassStatistics.load(path, num_classes=10)
    with pytest.raises(InputError, match="preprocessing"):
        ClassStatistics.load(path, preprocessing=Preprocessing((6, 5), (0.5, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match="cannot read class statistics"):
        ClassStatistics.load(tmp_path / "missing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot read class statistics"):
        ClassStatistics.load(tmp_path / "torn.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no class statistics"):
        ClassStatistics.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="class names"):
        statistics.merge(take(model, *pixels(data), preprocessing=statistics.preprocessing, class_names=["x", "y", "z"]))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda images, labels: labels.__setitem__(9, CLASSES),
            r"image 9 of the dataset \(batch 1, position 2\) has label 3",
        ),
        (lambda images, labels: labels.__setitem__(0, -1), "has label -1, expected 0 to 2"),
        (
            lambda images, labels: images[17].__setitem__((0, 2, 2), float("nan")),
            r"image 17 of the dataset .* NaN or infinite",
        ),
        (lambda images, labels: images[3].fill_(float("inf")), "image 3 of the dataset .* NaN or infinite pixel"),
        (lambda images, labels: labels.masked_fill_(labels == 1, 0), "no image of class one"),
    ],
)
def test_bad_data_is_named(model, data, spoil, message):
    images, labels = data[0].clone(), data[1].clone()
    spoil(images, labels)
    with pytest.raises(InputError, match=message):
        take(model, images, labels, class_names=["zero", "one", "two"])


def test_few_images_are_refused_unless_asked_for(model, data):
    with pytest.raises(InputError, match=r"fewer than 20 images in .* class\(es\): .*two \("):
        record(model, batches(*data), CLASSES, class_names=["zero", "one", "two"])
    record(model, batches(*data), CLASSES, allow_few_images=True)


def test_overflowing_teacher_is_named(data):
    model = settle(Chains())
    model.conv1.weight.data.fill_(1e38)
    with pytest.raises(InputError, match="'bn1' is not finite"):
        take(model, *data)
    assert not model.bn0._forward_pre_hooks  # hooks are gone also after an error


def test_wrong_outputs_and_names(model, data):
    with pytest.raises(InputError, match="each once"):
        take(model, *data, outputs=[1, 1, 2])
    with pytest.raises(InputError, match="class_names has 2"):
        take(model, *data, class_names=["a", "b"])
    with pytest.raises(InputError, match="no BatchNorm"):
        record(freeze(torch.nn.Linear(2, 2)), [], 1)


def test_a_teachers_outputs_are_found_by_the_names_of_its_classes(model, data):
    teacher = Teacher(model, "chains", 5, Preprocessing((6, 5), (0.5,) * 3, (0.5,) * 3), ["v", "w", "x", "y", "z"])
    pixels = data[0].float().sigmoid()
    assert take(teacher, pixels, data[1], class_names=["z", "w", "x"]).outputs == [4, 1, 2]
    assert take(teacher, pixels, data[1], class_names=["z", "w", "x"], outputs=[0, 1, 3]).outputs == [0, 1, 3]
    with pytest.raises(InputError, match="tells 5 classes apart and the dataset has 3: name its output"):
        take(teacher, pixels, data[1])
    with pytest.raises(InputError, match="outputs must name one of the teacher's 5 outputs"):
        take(teacher, pixels, data[1], outputs=[1, 2, 99])


class OneBroken(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i == 2:
            raise InputError("c.png is damaged: remove it") from OSError("no such pixel")
        return torch.rand(3, 6, 5), i % CLASSES


def test_an_error_of_a_loaders_process_comes_as_it_was(model):
    with pytest.raises(InputError) as raised:
        record(model, torch.utils.data.DataLoader(OneBroken(), 2, num_workers=1), CLASSES)
    assert str(raised.value) == "c.png is damaged: remove it"


@pytest.mark.parametrize("without", ["version", "sites", "teacher", "description"])
def test_a_file_that_does_not_say_what_it_is(model, data, tmp_path, without):
    take(model, *data).save(tmp_path / "s")
    with safetensors.safe_open(tmp_path / "s", "pt") as file:
        about = file.metadata()
    description = json.loads(about.pop("description"))
    description.pop(without, None)
    if without != "description":
        about["description"] = json.dumps(description)
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "s"), tmp_path / "s", about)
    with pytest.raises(InputError, match=rf"is damaged: what it says of itself cannot be read \(KeyError: '{without}'\)"):
        ClassStatistics.load(tmp_path / "s")


def test_recording_does_not_depend_on_the_batches(data):
    model = freeze(build_model("resnet8", CLASSES).double())
    images = data[0].double()
    reference = take(model, images, data[1]).moments()
    other = record(model, batches(images, data[1], size=13), CLASSES, minimum_images=1).moments()
    for a, b in zip(reference, other):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
