"""What a teacher said of a view is what the student learns of that very view, however often the labelling was stopped."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from bnfuse import InputError, Labels, Preprocessing, RelabelConfig, load_dataset, relabel, relabelling, train, training
from bnfuse.checkpoints import save_checkpoint
from bnfuse.cli import main
from bnfuse.datasets import as_spec
from bnfuse.estimate import label_bytes
from bnfuse.manifest import read_store, verify
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.store import ImageRecord, Store
from bnfuse.training import TrainConfig
from bnfuse.views import Views

IMAGES, CLASSES, BATCH = 22, 2, 5  # an odd number of images, batches and files of several sizes
VIEWS = RelabelConfig(views=3, batch_size=BATCH, crop_scale=0.3, seed=4)
MIXED = dataclasses.replace(VIEWS, cutmix=1, mixup=2)  # as whole numbers, which are taken too
TRAIN = TrainConfig(model="resnet8", epochs=4, batch_size=BATCH, temperature=1.0, shift=3)


class Noted(nn.Module):
    """A network that keeps what it was shown in its mode."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        self.seen.append((self.training, x.detach().clone()))
        return self.network(x)

    def shown(self, training: bool) -> list[torch.Tensor]:
        return [x for mode, x in self.seen if mode == training]


def make_teacher(seed: int = 0, classes: int = CLASSES, names=None) -> Teacher:
    torch.manual_seed(seed)
    network = freeze(CifarResNet(8, classes, 3, width=4))
    return Teacher(network, "small", classes, Preprocessing((8, 9), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), names)


def make_store(root: Path, *, seed: int = 0, finish: bool = True) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with Store.open(root, card={}, class_names=["a", "b"]) as store:
        for unit in range(IMAGES // CLASSES):
            pixels = torch.randint(0, 256, (CLASSES, 3, 8, 9), dtype=torch.uint8, generator=generator)
            store.commit(unit, pixels, [ImageRecord(k, unit, unit, {}) for k in range(CLASSES)])
        if finish:
            store.finish()
    return root


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(relabelling, "_IMAGES_A_FILE", 2 * BATCH)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "made")


def go(store: Path, config: RelabelConfig, teacher: Teacher | None = None, **options):
    return relabel(store, teacher or make_teacher(), config, progress=False, device="cpu", **options)


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_plain_labels_are_the_teachers_of_each_image(store):
    teacher = make_teacher()
    done = go(store, RelabelConfig(batch_size=BATCH), teacher)
    assert (done.views, done.made, done.out) == (IMAGES, IMAGES, store / "relabel")
    data = load_dataset(str(store))
    expected = teacher.model(teacher.preprocessing.normalize(data.batch(range(IMAGES))[0]))
    logits = Labels(done.out).logits()
    assert logits.dtype == torch.float32 and logits.equal(logits.half().float())
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)  # kept in float16
    assert verify(store) == []
    result = train(data, TRAIN, labels=Labels(done.out), progress=False)
    data.soft_labels = logits
    assert train(data, TRAIN, soft_labels=True, progress=False).history[-1]["loss"] == result.history[-1]["loss"]


@pytest.mark.parametrize("config", [VIEWS, MIXED], ids=["crop and flip", "mixed"])
@pytest.mark.parametrize("memory", ["in memory", "by a loader"])
def test_the_student_sees_exactly_what_the_teacher_labelled(store, config, memory, monkeypatch):
    teacher = make_teacher()
    teacher = dataclasses.replace(teacher, model=freeze(Noted(teacher.model)))
    go(store, config, teacher)
    labels = Labels(store / "relabel")
    students = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *a: students.append(Noted(build(*a))) or students[-1])
    if memory == "by a loader":
        monkeypatch.setattr("bnfuse.batches.IN_MEMORY_BYTES", 0)
    train(load_dataset(str(store)), TRAIN, labels=labels, preprocessing=teacher.preprocessing, progress=False)
    seen, shown = students[0].shown(training=True), teacher.model.shown(training=False)
    assert len(shown) == 3 * len(seen) / 4 and len(set(map(len, shown))) > 1
    for a, b in zip(seen, [*shown, *shown]):  # the fourth epoch begins again
        assert a.equal(b)
    assert not seen[0].equal(seen[5])  # each pass has views of its own


@pytest.mark.parametrize("config", [VIEWS, MIXED, dataclasses.replace(MIXED, crop_scale=1.0, flip=False, mixup=0.0)])
@pytest.mark.parametrize("batch_size", [BATCH, 7, IMAGES])
def test_a_replayed_views_logits_are_the_teachers_of_it(store, config, batch_size):
    """Also in batches of another size, where partners must be fetched from elsewhere."""
    teacher = make_teacher()
    go(store, config, teacher)
    labels, data = Labels(store / "relabel"), load_dataset(str(store)).in_memory()
    source = training.Source(data, teacher.preprocessing, torch.device("cpu"))
    for number in range(3):
        views, images = labels.views(number), 0
        assert views.views.index.sort().values.equal(torch.arange(IMAGES))
        replayed = training._replayed(source, views, dataclasses.replace(TRAIN, batch_size=batch_size))
        for inputs, target, _ in replayed:
            answer = teacher.model(inputs)
            torch.testing.assert_close(target, answer.softmax(1), rtol=2e-3, atol=2e-3)  # kept in float16
            torch.testing.assert_close(views.logits(slice(images, images + len(inputs))), answer, rtol=2**-10, atol=1e-4)
            images += len(inputs)
        assert images == IMAGES


def test_views_mean_what_they_say():
    images = torch.rand(3, 1, 6, 6)
    index = torch.arange(3)
    whole = torch.tensor([[1.0, 1.0, 0.5, 0.5]]).expand(3, 4)
    flips = torch.tensor([True, False, True])
    shown = Views(index, whole, flips).show(images, slice(0, 3))
    torch.testing.assert_close(shown, torch.where(flips[:, None, None, None], images.flip(3), images), rtol=1e-5, atol=1e-6)
    corner = torch.tensor([[0.5, 0.5, 1.0, 0.0]]).expand(3, 4)  # the upper right quarter
    blocks = torch.arange(4.0).reshape(1, 1, 2, 2).repeat_interleave(6, 2).repeat_interleave(6, 3).expand(3, 1, 12, 12)
    shown = Views(index, corner).show(blocks, slice(0, 3))
    assert (shown[:, :, :-1, 1:] == 1).all()  # but where it borders on the others, interpolated
    mixes = torch.tensor([[0.0, 0.25, 0, 0], [0.0, 1.0, 0, 0], [1.0, 0.75, 0.5, 0.5]])  # a quarter; itself; a box of a quarter
    mixed = Views(index, mixes=mixes, partners=torch.tensor([1, 2, 0]))
    constant = torch.tensor([0.0, 1.0, 4.0])[:, None, None, None].expand(3, 1, 4, 4)
    shown = mixed.show(constant, slice(0, 3))
    assert (shown[0] == 0.75).all() and (shown[1] == 1).all()
    assert shown[2, 0].tolist() == [[4, 4, 4, 4], [4, 0, 0, 4], [4, 0, 0, 4], [4, 4, 4, 4]]
    assert mixed.needed(slice(0, 1)).tolist() == [0, 1] and mixed.show(constant[:2], slice(0, 1)).equal(shown[:1])


def test_stopped_anywhere_it_ends_with_the_same_bytes(store, tmp_path):
    go(store, MIXED, out=tmp_path / "whole")
    expected = files(tmp_path / "whole")
    assert len(expected) == 1 + 3 * 3  # the card; three passes of five batches, two a file
    for kill_at in range(1, 10):
        child = os.fork()
        if not child:
            relabelling.write_views = _DyingAt(kill_at)
            try:
                go(store, MIXED, out=tmp_path / "killed")
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with pytest.raises(InputError, match="is not finished: run the same `bnfuse relabel` again"):
            Labels(tmp_path / "killed")
        done = go(store, MIXED, out=tmp_path / "killed")
        assert done.made == 3 * IMAGES - sum(file.images for file in relabelling._plan(MIXED, IMAGES)[: kill_at - 1])
        assert files(tmp_path / "killed") == expected
        shutil.rmtree(tmp_path / "killed")


class _DyingAt:
    """`write_views`, which the process does not survive the nth time: half a file is left."""

    def __init__(self, nth: int):
        self.write, self.left = relabelling.write_views, nth

    def __call__(self, path: Path, *rest):
        self.left -= 1
        if not self.left:
            path.with_name(f".1-{path.name}.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.write(path, *rest)


def test_what_was_torn_or_lost_is_made_again(store):
    done = go(store, VIEWS)
    expected = files(done.out)
    torn, lost, card = done.out / "0001-00002.safetensors", done.out / "0002-00000.safetensors", done.out / "labels.json"
    torn.write_bytes(torn.read_bytes()[:-7])
    lost.unlink()
    with pytest.raises(InputError, match="cannot read labels from .*0001-00002"):
        Labels(done.out).views(1)
    with pytest.raises(InputError, match="pass 2 has 13 images, expected 22"):
        Labels(done.out).views(2)
    plan = {file.name: file.images for file in relabelling._plan(VIEWS, IMAGES)}
    assert go(store, VIEWS).made == plan[torn.name] + plan[lost.name]
    assert files(done.out) == expected
    assert go(store, VIEWS).made == 0
    card.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        go(store, VIEWS)


def test_the_size_is_said_beforehand(store, monkeypatch):
    for config, out in ((RelabelConfig(batch_size=BATCH), "a"), (VIEWS, "b"), (MIXED, "c")):
        done = go(store, config, out=store / out)
        headers = sum(int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in done.out.glob("*.safetensors"))
        assert done.bytes == label_bytes(done.views, CLASSES, config) + headers
    monkeypatch.setattr("bnfuse.estimate.free_bytes", lambda path: 100)
    with pytest.raises(InputError, match="labels of 66 views take 1.6 kB, but only 100 bytes are free"):
        go(store, VIEWS, out=store / "d")
    monkeypatch.undo()
    go(store, dataclasses.replace(VIEWS, views=1), out=store / "d")  # asked for less, it runs


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda store: {"teacher": make_teacher(1)}, r"teacher.fingerprint: given"),
        (lambda store: {"config": dataclasses.replace(VIEWS, seed=5)}, "config.seed: given 5, the dataset has 4"),
        (
            lambda store: {
                "teacher": dataclasses.replace(make_teacher(), preprocessing=Preprocessing((8, 8), *[(1,) * 3] * 2))
            },
            "preprocessing.image_size",
        ),
        (lambda store: {"store": make_store(store.parent / "other", seed=1), "out": store / "relabel"}, "dataset.sha256"),
    ],
)
def test_other_labels_are_refused(store, change, message):
    go(store, VIEWS)
    before = files(store)
    arguments = {"store": store, "config": VIEWS} | change(store)
    with pytest.raises(InputError, match=message):
        go(**arguments)
    assert files(store) == before


def test_what_cannot_be_labelled_or_learnt(store, tmp_path):
    with pytest.raises(InputError, match="is not finished"):
        go(make_store(tmp_path / "unfinished", finish=False), VIEWS)
    with pytest.raises(InputError, match="tells 3 classes apart and the dataset has 2"):
        go(store, VIEWS, make_teacher(classes=3))
    with pytest.raises(InputError, match="each once, got"):
        go(store, VIEWS, make_teacher(classes=3), outputs=[0, 3])
    with pytest.raises(InputError, match="holds no labels .card.json"):
        go(store, VIEWS, out=store)
    huge = make_teacher()
    huge.model.linear.bias.data += 1e5
    with pytest.raises(InputError, match="finite in float16"):
        go(store, VIEWS, huge, out=tmp_path / "huge")
    with pytest.raises(InputError, match="holds no labels: make them"):
        Labels(store / "relabel")
    go(store, VIEWS)
    labels, data = Labels(store / "relabel"), load_dataset(str(store))
    with pytest.raises(InputError, match="labels 22 images of 2 classes, .* has 4 of 2"):
        train(data.first_per_class(2), TRAIN, labels=labels, progress=False)
    with pytest.raises(InputError, match="shown as they were labelled, each once: leave out sampling='class_balanced'"):
        train(data, dataclasses.replace(TRAIN, sampling="class_balanced"), labels=labels, progress=False)
    with pytest.raises(InputError, match="labelled at 8x9 pixels and the images are 6x6"):
        train(load_dataset(str(store), image_size=(6, 6)), TRAIN, labels=labels, progress=False)


def test_a_dataset_may_be_called_as_a_built_in_one_is(tmp_path, monkeypatch, capsys):
    """`./digits` is the folder, though argparse's paths forget how it was written."""
    expected = Labels(go(make_store(tmp_path / "other"), RelabelConfig(batch_size=BATCH)).out).logits()
    make_store(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert Labels(go(Path("./digits"), RelabelConfig(batch_size=BATCH)).out).logits().equal(expected)
    assert as_spec(Path("./digits")) == "./digits" and as_spec(Path("made/digits")) == "made/digits"
    assert load_dataset(as_spec(Path("digits"))).num_classes == CLASSES


def test_what_stands_in_the_way_of_labels_is_said(store, tmp_path):
    with pytest.raises(InputError, match="workers must be at least 0, got -1"):
        go(store, VIEWS, workers=-1)
    go(store, RelabelConfig(batch_size=BATCH))
    data, labels = load_dataset(str(store)), Labels(store / "relabel")
    with pytest.raises(InputError, match="shift=8 is no less than the image size"):
        train(data, dataclasses.replace(TRAIN, shift=8), labels=labels, progress=False)
    card = json.loads((store / "relabel" / "labels.json").read_text())
    for broken in ({**card, "config": {}}, {name: value for name, value in card.items() if name != "complete"}):
        (store / "relabel" / "labels.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match="is damaged, it does not say '(views|complete)': delete"):
            Labels(store / "relabel")


def test_a_teacher_of_the_same_classes_in_another_order_is_read_by_name(store, tmp_path):
    go(store, RelabelConfig(batch_size=BATCH), make_teacher(names=["a", "b"]))
    go(store, RelabelConfig(batch_size=BATCH), make_teacher(names=["b", "a"]), out=tmp_path / "turned")
    assert Labels(tmp_path / "turned").logits().equal(Labels(store / "relabel").logits().flip(1))


def test_a_student_may_see_the_views_at_another_size(store):
    """The same part of the image, in fewer pixels or in more."""
    go(store, VIEWS)
    labels = Labels(store / "relabel")
    for size in ((8, 9), (16, 18)):
        result = train(load_dataset(str(store), image_size=size), TRAIN, labels=labels, progress=False)
        assert result.preprocessing.image_size == size and len(result.history) == TRAIN.epochs
    slopes = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.linspace(-1, 1, 32)[:, None], torch.linspace(-1, 1, 48)
    large = slopes[..., :1, None] * rows + slopes[..., 1:, None] * columns  # [6, 3, 32, 48], as easily seen in fewer pixels
    views = Views.draw(torch.arange(6), dataclasses.replace(VIEWS, flip=True), torch.Generator().manual_seed(1))
    assert views.flips.any() and not views.flips.all()
    halved = lambda images: torch.nn.functional.avg_pool2d(images, 2)
    of_halved, of_large = views.show(halved(large), slice(0, 6)), halved(views.show(large, slice(0, 6)))
    inside = (..., slice(2, -2), slice(2, -2))  # beyond the border nothing is known
    torch.testing.assert_close(of_halved[inside], of_large[inside], rtol=1e-4, atol=1e-4)
    assert (of_large - halved(large)).abs().max() > 0.1


@pytest.mark.parametrize(
    "fields, message", [({"views": -1}, "views"), ({"crop_scale": 0.0}, "crop_scale"), ({"cutmix": -1}, "cutmix")]
)
def test_config_errors(fields, message):
    with pytest.raises(InputError, match=message):
        RelabelConfig(**fields)


def test_a_teacher_of_more_classes_is_read_by_name_or_by_number(store, tmp_path):
    named = make_teacher(classes=3, names=["b", "c", "a"])
    go(store, RelabelConfig(batch_size=BATCH), named)
    go(store, RelabelConfig(batch_size=BATCH), make_teacher(classes=3), outputs=[2, 0], out=tmp_path / "numbered")
    assert Labels(store / "relabel").logits().equal(Labels(tmp_path / "numbered").logits())
    assert json.loads((store / "relabel" / "labels.json").read_text())["outputs"] == [2, 0]


def test_commands(store, tmp_path, capsys):
    teacher = make_teacher()
    save_checkpoint(
        tmp_path / "t.safetensors",
        CifarResNet(8, CLASSES, 3),
        architecture="resnet8",
        num_classes=CLASSES,
        preprocessing=teacher.preprocessing,
    )
    command = ["relabel", str(store), "--teacher", str(tmp_path / "t.safetensors"), "--views", "2", "--cutmix", "1"]
    for expected in ("44 made now in", "0 made now, which were there already"):
        assert main(command) == 0
        text = capsys.readouterr().out
        assert expected in text and "--labels relabel --batch-size 128" in text
    fit = ["train", "--data", str(store), "--epochs", "3", "--model", "resnet8", "--out", str(tmp_path / "student")]
    assert main([*fit, "--labels", "relabel"]) == 0
    assert main([*fit, "--labels", str(store / "relabel")]) == 0
    capsys.readouterr()
    make_store(tmp_path / "other", seed=1)
    assert main([*fit, "--data", str(tmp_path / "other"), "--labels", str(store / "relabel")]) == 2
    assert "has the labels of other images" in capsys.readouterr().err
    assert main([*fit, "--data", "digits:train", "--labels", "relabel"]) == 2
    assert "needs a dataset that bnfuse made" in capsys.readouterr().err
    assert read_store(store).complete and verify(store) == []
