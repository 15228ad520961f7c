"""Training from scratch, and testing: on handwritten digits, small enough for one core."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfuse import batches, training
from bnfuse.batches import measure_preprocessing
from bnfuse.errors import InputError
from bnfuse.models import fingerprint, load_teacher
from bnfuse.preprocessing import Preprocessing
from bnfuse.training import TrainConfig, evaluate, train

FAST = TrainConfig(model="resnet8", epochs=6, batch_size=32, optimizer="sgd", lr=0.1, eval_every=3)


class Images:
    """The least that a dataset in memory is."""

    def __init__(self, images, labels, soft_labels=None, class_names=None):
        self.images = torch.as_tensor(images)  # uint8 [N, H, W, C]
        self.labels = torch.as_tensor(labels)  # int64 [N]
        self.soft_labels = soft_labels
        self.class_names = class_names or [f"digit {k}" for k in range(10)]
        self.num_classes, self.name = len(self.class_names), "some images"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i].permute(2, 0, 1).float() / 255, int(self.labels[i])


def with_soft_labels(data: Images, logits) -> Images:
    return Images(data.images, data.labels, logits, data.class_names)


class OneByOne:
    """The same images, without the tensor that holds them all."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.labels, self.soft_labels = dataset.labels, dataset.soft_labels
        self.class_names, self.num_classes, self.name = dataset.class_names, dataset.num_classes, dataset.name

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small networks gain nothing from more, and the sums keep their order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    """300 digits to train on, 200 others to test on."""
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    images = (x * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(y))
    return tuple(Images(images[part], y[part]) for part in (order[:300], order[300:500]))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """(the result of training on the digits, the folder it was written to)."""
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    return train(digits[0], FAST, test=digits[1], progress=False, out=out), out


def random_images(count=12, size=(8, 8), channels=3, classes=3) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *size, channels), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(count) % classes, class_names=[f"class {k}" for k in range(classes)])


def test_digits_are_learnt(trained):
    result, _ = trained
    assert result.accuracy > 0.8 and result.train_accuracy > 0.8
    assert [round_["epoch"] for round_ in result.history if "accuracy" in round_] == [3, 6]
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    assert len(result.per_class_accuracy) == 10 and not result.model.training


def test_what_is_written_can_be_loaded_and_does_as_well(trained, digits):
    result, out = trained
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "model.safetensors"]
    teacher = load_teacher(out / "model.safetensors")
    assert teacher.class_names == digits[0].class_names and teacher.preprocessing == result.preprocessing
    assert evaluate(teacher.model, digits[1], teacher.preprocessing).accuracy == result.accuracy
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["accuracy"] == result.accuracy and metrics["fingerprint"] == teacher.fingerprint
    assert metrics["per_class_accuracy"]["digit 3"] == result.per_class_accuracy[3]
    assert TrainConfig(**metrics["config"]) == FAST


def test_the_same_seed_gives_the_same_network_and_leaves_the_global_one_alone(digits):
    config = replace(FAST, epochs=1, flip=True, crop_scale=0.7, mixup=0.5, cutmix=0.5, noise=0.1)
    torch.manual_seed(1)
    first = train(digits[0], config, progress=False)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    again = train(digits[0], config, progress=False)
    other = train(digits[0], replace(config, seed=1), progress=False)
    assert fingerprint(first.model) == fingerprint(again.model) != fingerprint(other.model)
    assert first.accuracy is None and first.per_class_accuracy is None


@pytest.mark.parametrize("workers", [0, 1])
def test_images_read_one_by_one_train_the_same_network(workers):
    images = random_images()
    config = replace(FAST, epochs=1, batch_size=5, flip=True, shift=2, crop_scale=0.5, workers=workers)
    in_memory = train(images, config, progress=False)
    one_by_one = train(OneByOne(images), config, test=OneByOne(images), progress=False)
    assert one_by_one.preprocessing.image_size == (8, 8)
    for own, expected in zip(one_by_one.model.parameters(), in_memory.model.parameters()):
        torch.testing.assert_close(own, expected)


def test_a_small_dataset_on_disk_is_decoded_once(monkeypatch):
    class OnDisk(OneByOne):
        nbytes, decoded = 1000, 0

        def in_memory(self):
            self.decoded += 1
            return self.dataset

    config, data = replace(FAST, epochs=1), OnDisk(random_images())
    train(data, config, progress=False)
    assert data.decoded == 1
    monkeypatch.setattr(batches, "IN_MEMORY_BYTES", 999)
    train(data, config, progress=False)
    assert data.decoded == 1


def test_soft_labels_bring_the_student_close_to_the_teacher(trained, digits):
    teacher, data = trained[0], digits[0]
    pixels = data.images.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = teacher.model(teacher.preprocessing.normalize(pixels))
    relabelled = Images(data.images, torch.zeros_like(data.labels), soft_labels=logits)  # wrong, were they used
    config = replace(FAST, temperature=2.0)
    student = train(relabelled, config, preprocessing=teacher.preprocessing, soft_labels=True, progress=False)
    with torch.no_grad():
        own = student.model(teacher.preprocessing.normalize(pixels))

    def divergence(own):
        return F.kl_div(F.log_softmax(own, 1), F.log_softmax(logits, 1), reduction="batchmean", log_target=True)

    assert divergence(own) < 0.2 * divergence(torch.zeros_like(own))
    assert evaluate(student.model, digits[1], teacher.preprocessing).accuracy > 0.75
    assert student.history[-1]["loss"] < student.history[0]["loss"] / 2


def test_the_distillation_loss_is_that_of_hinton():
    own, logits = torch.randn(2, 5, 4, dtype=torch.float64)
    p, q = torch.softmax(logits / 3, 1), torch.softmax(own / 3, 1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(training.distillation_loss(own, p, 3.0), expected)


@pytest.mark.parametrize("count, batch_size", [(2, 2), (3, 2), (129, 128), (300, 32), (5, 100), (1437, 128)])
def test_batches_are_even_and_never_a_single_image(count, batch_size):
    slices = batches.even_batches(count, batch_size)
    sizes = [len(range(count)[part]) for part in slices]
    assert sum(sizes) == count and slices[0].start == 0
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 3)


def test_the_learning_rate_rises_and_falls():
    factors = [training._lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and factors[-1] < 1e-3
    assert training._lr_factor(0, 100, 0.0) == 1


def test_flip_and_shift_move_each_image_by_its_own_draw():
    height, width = 5, 7
    images = torch.arange(4 * height * width, dtype=torch.int32).reshape(4, height, width, 1)
    index = torch.arange(4).repeat_interleave(100)
    config = TrainConfig(flip=True, shift=2)
    moved = batches.flip_and_shift(images, index, config, torch.Generator().manual_seed(0))
    seen = set()
    for original, image in zip(images[index], moved):
        padded = np.pad(original[..., 0].numpy(), 2, mode="reflect")
        found = {
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if np.array_equal(padded[:, :: -1 if mirrored else 1][dy : dy + height, dx : dx + width], image[..., 0])
        }
        assert len(found) == 1
        seen |= found
    assert len(seen) == 50  # every shift, mirrored and not


def test_crops_keep_a_linear_image_linear_and_within_its_range():
    ramp = torch.linspace(0, 1, 16).expand(200, 1, 16, 16)  # brighter to the right
    crops = batches.random_crop(ramp, 0.25, torch.Generator().manual_seed(0))
    assert crops.shape == ramp.shape and crops.min() >= 0 and crops.max() <= 1
    slope = (crops[:, 0, 8, 12] - crops[:, 0, 8, 4]) / (ramp[:, 0, 8, 12] - ramp[:, 0, 8, 4])  # width of each crop
    assert 0.4 < slope.min() < 0.5 and 0.95 < slope.max() <= 1.0001
    torch.testing.assert_close(crops[:, :, 3], crops[:, :, 12])
    assert batches.random_crop(ramp, 1.0, torch.Generator()) is ramp


@pytest.mark.parametrize("mixup, cutmix", [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_mixed_targets_have_the_proportions_of_the_mixed_images(mixup, cutmix):
    inputs = torch.eye(6).repeat(50, 1)[:, :, None, None].expand(300, 6, 8, 8).contiguous()  # channel k is class k
    target = torch.eye(6).repeat(50, 1)
    config = TrainConfig(mixup=mixup, cutmix=cutmix)
    mixed, mixed_target = batches.mix(inputs, target, config, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.mean((2, 3)), mixed_target)
    torch.testing.assert_close(mixed_target.sum(1), torch.ones(300))
    hard = ((mixed == 0) | (mixed == 1)).all(1).all(1).all(1)  # CutMix, or an image mixed with its own class
    smooth = (mixed == mixed[:, :, :1, :1]).all(1).all(1).all(1)
    assert hard.all() == (mixup == 0) and smooth.all() == (cutmix == 0)


@pytest.mark.parametrize("wrap", [lambda images: images, OneByOne])
def test_the_measured_preprocessing_is_that_of_the_pixels(wrap):
    images = random_images(count=300, size=(5, 4))
    images.images[..., 2] = 51
    found = measure_preprocessing(wrap(images))
    pixels = images.images.double().numpy() / 255
    assert found.image_size == (5, 4)
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)))
    np.testing.assert_allclose(found.std[:2], pixels.std((0, 1, 2))[:2], rtol=1e-6)
    assert found.std[2] == pytest.approx(1 / 255)


class Constant(nn.Module):
    """Always answers class 1, but where the first pixel is bright, class 0."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x):
        bright = x[:, 0, 0, 0] > 0
        return torch.stack([bright * 2.0, torch.ones(len(x)), torch.zeros(len(x))], 1)


def test_evaluation_counts_class_by_class():
    data = Images(np.zeros((5, 4, 4, 1), np.uint8), [0, 0, 1, 1, 1], class_names=["a", "b", "c"])
    data.images[0, 0, 0], data.images[4, 0, 0] = 255, 255
    model = Constant()
    model.bn.eval()
    result = evaluate(model, data, Preprocessing((4, 4), (0.5,), (0.5,)), batch_size=2)
    assert result.predictions.tolist() == [0, 1, 1, 1, 0] and result.predictions.dtype == torch.int64
    assert result.accuracy == pytest.approx(0.6)
    assert result.per_class_accuracy == [0.5, pytest.approx(2 / 3), None]
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [2, 1, 0]])
    assert result.loss == pytest.approx(F.cross_entropy(logits, data.labels).item())
    assert model.training and not model.bn.training  # each module's mode is put back


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 1),
        ("optimizer", "adam"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("warmup", 1.0),
        ("label_smoothing", 1.0),
        ("shift", -1),
        ("crop_scale", 0.0),
        ("crop_scale", 1.1),
        ("mixup", -0.1),
        ("cutmix", float("inf")),
        ("noise", "much"),
        ("temperature", 0.0),
        ("seed", True),
        ("eval_every", -1),
        ("workers", -1),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=f"^{field} must be .*, got {value!r}"):
        TrainConfig(**{field: value})


def test_an_optimizer_has_its_own_defaults():
    assert (TrainConfig().lr, TrainConfig(optimizer="sgd").lr) == (2e-3, 0.1)
    assert TrainConfig(optimizer="sgd", lr=0.3, weight_decay=0.0).weight_decay == 0


def test_a_training_that_diverges_says_so(digits):
    with pytest.raises(InputError, match=r"the loss is nan in epoch 1: .* lower lr, now 1e\+30"):
        train(digits[0], replace(FAST, lr=1e30), progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: {"soft_labels": True}, "some images has no soft labels: relabel"),
        (lambda d: {"soft_labels": True, "dataset": with_soft_labels(d, torch.zeros(12, 4))}, r"\[12, 3\].* \[12, 4\]"),
        (lambda d: {"soft_labels": True, "dataset": with_soft_labels(d, torch.zeros(12, 3) / 0)}, "not all finite"),
        (lambda d: {"dataset": random_images(1)}, "has 1 images; training with BatchNorm needs at least 2"),
        (lambda d: {"dataset": random_images(0)}, "has no images"),
        (lambda d: {"dataset": Images(d.images, d.labels + 1, None, list("abc"))}, "from 1 to 3, expected 0 to 2"),
        (lambda d: {"test": random_images(classes=4)}, "3 classes and the test dataset some images 4"),
        (lambda d: {"test": Images(d.images, d.labels, None, d.class_names[::-1])}, "at other places"),
        (lambda d: {"test": Images(d.images, d.labels, None, [d.class_names[1], "x", "y"])}, "at other places"),
        (lambda d: {"test": random_images(size=(9, 8))}, "3 channels and 9x8 pixels, .* expects 3 channels and 8x8"),
        (lambda d: {"test": OneByOne(random_images(channels=1)), "config": replace(FAST, epochs=1)}, "of 1 channels"),
        (lambda d: {"preprocessing": Preprocessing((32, 32), (0,), (1,))}, "expects 1 channels and 32x32 pixels"),
        (lambda d: {"config": replace(FAST, shift=8)}, r"shift=8 is no less than the image size \(8, 8\)"),
        (lambda d: {"config": replace(FAST, model="resnet9")}, "no model is called 'resnet9'"),
        (lambda d: {"out": __file__}, "cannot write .*test_training.py/model.safetensors: File exists; choose another place"),
    ],
)
def test_what_does_not_fit_is_explained(change, message):
    data = random_images()
    arguments = {"dataset": data, "config": FAST, "progress": False} | change(data)
    with pytest.raises(InputError, match=message):
        train(arguments.pop("dataset"), arguments.pop("config"), **arguments)


def test_a_network_that_returns_more_than_logits_in_training_is_explained(tmp_path):
    (tmp_path / "net.py").write_text(
        "from bnfuse.networks import CifarResNet\n"
        "class Net(CifarResNet):\n"
        "    def forward(self, x):\n"
        "        return (super().forward(x), x) if self.training else super().forward(x)\n"
        "net = lambda: Net(8, 3)\n"
    )
    with pytest.raises(InputError, match="net returns tuple in training mode"):
        train(random_images(), replace(FAST, model=f"{tmp_path}/net.py:net"), progress=False)
