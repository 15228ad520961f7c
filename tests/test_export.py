"""What an export holds is what the store holds, as the libraries that it is meant for read it; or there is no export."""

import io
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision_shim import import_torchvision

from bnfuse import InputError, Labels, Preprocessing, RelabelConfig, exporting, relabel
from bnfuse.cli import main
from bnfuse.exporting import FORMATS, export
from bnfuse.files import locked_folder
from bnfuse.manifest import read_store
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.store import ImageRecord, Store

NAMES = ["cat", 'a "dog" | x', "über\n\x7f😀"]
CARD = {"teacher": {"architecture": "net|x", "fingerprint": "ab"}, "statistics": {"dataset": "digits"}}

without_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed: bnfuse[parquet]")
every_format = pytest.mark.parametrize(
    "format", [pytest.param(name, marks=without_pyarrow if name == "parquet" else ()) for name in FORMATS]
)


def make_store(root: Path, *, soft: bool = True, finish: bool = True, images: int = 4) -> Path:
    """`images` images of each class, in units of two classes' worth of noise, not in the order of the classes."""
    generator = torch.Generator().manual_seed(0)
    with Store.open(root, card=CARD, class_names=NAMES) as store:
        for unit in range(images):
            pixels = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=generator)
            records = [ImageRecord(k, unit, 10 * unit + k, {"bn": 1.0}) for k in (2, 0, 1)]
            store.commit(unit, pixels, records, torch.randn(3, 6, generator=generator) if soft else None)
        if finish:
            store.finish()
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("export") / "made")


@pytest.fixture(scope="module")
def expected(store):
    """id → (pixels [H, W, 3], class, float16 logits [K])."""
    contents = read_store(store)
    logits = contents.soft_labels().half().numpy()
    return {
        entry.id: (np.array(Image.open(store / entry.file)), entry.class_index, row)
        for entry, row in zip(contents.entries, logits)
    }


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def assert_samples_are(expected, found) -> None:
    """`found`: (id, pixels, class, logits) each."""
    found = {name: rest for name, *rest in found}
    assert set(found) == set(expected)
    for name, (pixels, label, logits) in expected.items():
        assert np.array_equal(np.asarray(found[name][0]), pixels) and int(found[name][1]) == label
        assert np.asarray(found[name][2]).dtype == np.float16 and np.array_equal(found[name][2], logits)


def test_webdataset_reads_it(store, expected, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: pip install 'bnfuse[test]'")
    result = export(store, tmp_path / "out", "webdataset", images_per_shard=5)
    assert result.images == 12 and sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == [
        f"train-{i:06d}.tar" for i in range(3)
    ]
    samples = webdataset.WebDataset(str(tmp_path / "out" / "train-{000000..000002}.tar"), shardshuffle=False).decode("pil")
    samples = list(samples)
    assert_samples_are(expected, [(s["__key__"], s["png"], s["cls"], s["logits.npy"]) for s in samples])
    assert all(s["json"]["class_name"] == NAMES[s["cls"]] and s["json"]["id"] == s["__key__"] for s in samples)
    labels = [s["cls"] for s in samples]
    assert labels != sorted(labels)  # mixed over the shards


@pytest.mark.parametrize("format", ["parquet", "imagefolder", "webdataset"])
def test_datasets_loads_it(store, expected, tmp_path, format, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'bnfuse[test]'")
    datasets.disable_progress_bars()
    export(store, tmp_path / "out", format, images_per_shard=5)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 12
    if format == "webdataset":
        assert_samples_are(expected, [(s["__key__"], s["png"], s["cls"], np.float16(s["logits.npy"])) for s in loaded])
        return
    assert isinstance(loaded.features["image"], datasets.Image)
    found = {(image.tobytes(), label) for image, label in zip(loaded["image"], loaded["label"])}
    assert found == {(pixels.tobytes(), label) for pixels, label, _ in expected.values()}
    if format == "parquet":
        assert loaded.features["label"].names == NAMES and loaded.features["logits"].length == 6
        by_file = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / "out/data/*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert by_file.features == loaded.features
        rows = loaded.cast_column("image", datasets.Image(decode=False)).with_format("numpy")
        ids = [Path(row["image"]["path"]).stem for row in rows]
        assert_samples_are(expected, [(i, s["image"], s["label"], np.float16(s["logits"])) for i, s in zip(ids, loaded)])


def test_image_folder_reads_it(store, expected, tmp_path):
    export(store, tmp_path / "out", "imagefolder")
    folder = import_torchvision().datasets.ImageFolder(str(tmp_path / "out" / "train"))
    assert len(folder) == 12
    logits = {path.stem: load_file(path)["logits"] for path in (tmp_path / "out" / "soft_labels").iterdir()}
    found, row_of = [], {}
    for path, label in folder.samples:
        name = Path(path).parent.name
        row_of[name] = row_of.get(name, -1) + 1
        found.append((Path(path).stem, Image.open(path), label, logits[name][row_of[name]].numpy()))
    assert_samples_are(expected, found)


# ---- what `relabel` made ----


@pytest.fixture(scope="module")
def relabelled(store, tmp_path_factory):
    """The teacher, and folders of its labels of the store: plain ones, and views that are mixed."""
    torch.manual_seed(0)
    teacher = Teacher(freeze(CifarResNet(8, 3, 3, width=4)), "a|net", 3, Preprocessing((5, 7), [0.5] * 3, [0.25] * 3))
    folder, options = tmp_path_factory.mktemp("labels"), {"device": "cpu", "progress": False}
    relabel(store, teacher, RelabelConfig(), out=folder / "plain", **options)
    relabel(store, teacher, RelabelConfig(views=2, batch_size=5, crop_scale=0.5, cutmix=1.0), out=folder / "views", **options)
    return teacher, folder


def samples_of(out: Path) -> dict[str, dict]:
    """id → the fields of its sample, of an export by `webdataset`."""
    samples = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                key, field = name.split(".", 1)
                samples.setdefault(key, {})[field] = tar.extractfile(name).read()
    return samples


@every_format
def test_plain_labels_take_the_place_of_the_stores_own(store, relabelled, tmp_path, format):
    teacher, folder = relabelled
    labels = Labels(folder / "plain")
    export(store, tmp_path / "out", format, labels=labels)
    expected = {e.id: row.numpy() for e, row in zip(read_store(store).entries, labels.logits().half())}
    if format == "webdataset":
        found = {key: np.load(io.BytesIO(s["logits.npy"])) for key, s in samples_of(tmp_path / "out").items()}
    elif format == "parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(tmp_path / "out/data").to_pylist()
        found = {Path(row["image"]["path"]).stem: np.float16(row["logits"]) for row in rows}
    else:
        rows = torch.cat([load_file(path)["logits"] for path in sorted((tmp_path / "out/soft_labels").iterdir())])
        found = dict(zip(sorted(path.stem for path in (tmp_path / "out/train").rglob("*.png")), rows.numpy()))
    assert found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)
    assert json.loads((tmp_path / "out/card.json").read_text())["export"]["labels"]["teacher"]["architecture"] == "a|net"
    assert "The logits of a\\|net of each image" in (tmp_path / "out/README.md").read_text()


@every_format
def test_views_go_along_and_their_images_are_found_by_id(store, relabelled, tmp_path, format):
    """What is in the export alone is enough to show the teacher a view again."""
    teacher, folder = relabelled
    export(store, tmp_path / "out", format, labels=Labels(folder / "views"))
    assert files(tmp_path / "out/relabel").items() >= files(folder / "views").items()
    assert "2 augmented views of each image with the logits of a\\|net" in (tmp_path / "out/README.md").read_text()
    if format != "webdataset":
        return
    samples, ids = samples_of(tmp_path / "out"), json.loads((tmp_path / "out/relabel/ids.json").read_text())
    pass_ = Labels(tmp_path / "out/relabel").views(1)
    part = slice(0, len(ids))
    pixels = [np.array(Image.open(io.BytesIO(samples[ids[i]]["png"]))) for i in pass_.views.index[pass_.views.needed(part)]]
    shown = pass_.views.show(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255, part)
    answer = teacher.model(teacher.preprocessing.normalize(shown)).half().float()
    torch.testing.assert_close(pass_.logits(part), answer, rtol=1e-3, atol=1e-3)  # kept in float16
    assert np.load(io.BytesIO(samples[ids[0]]["logits.npy"])).shape == (6,)  # the store's own


def test_labels_of_other_images_are_refused_and_damaged_ones_leave_nothing(store, relabelled, tmp_path):
    folder = relabelled[1]
    other = make_store(tmp_path / "other", images=3)
    with pytest.raises(InputError, match="has the labels of other images"):
        export(other, tmp_path / "out", "webdataset", labels=Labels(folder / "views"))
    shutil.copytree(folder / "views", tmp_path / "views")
    next((tmp_path / "views").glob("0001-*")).unlink()
    with pytest.raises(InputError, match="pass 1 has 0 images, expected 12"):
        export(store, tmp_path / "out", "webdataset", labels=Labels(tmp_path / "views"))
    assert {path.name for path in tmp_path.iterdir()} == {"other", "views"}


def test_the_command_says_that_labels_were_left_out(store, relabelled, tmp_path, capsys):
    made = tmp_path / "made"
    shutil.copytree(store, made)
    shutil.copytree(relabelled[1] / "views", made / "relabel")
    assert main(["export", str(made), "--format", "webdataset", str(tmp_path / "a")]) == 0
    assert f"the labels in {made / 'relabel'} are not among them: --labels relabel takes them" in capsys.readouterr().out
    assert not (tmp_path / "a/relabel").exists()
    assert main(["export", str(made), "--format", "webdataset", str(tmp_path / "b"), "--labels", "relabel"]) == 0
    assert "are not among them" not in capsys.readouterr().out and (tmp_path / "b/relabel/labels.json").exists()


@every_format
def test_the_same_bytes_twice(store, tmp_path, format):
    for name in "ab":
        export(store, tmp_path / name, format, images_per_shard=5)
        time.sleep(0.01)
    a = files(tmp_path / "a")
    assert a == files(tmp_path / "b") and json.loads(a["card.json"])["export"] == {"format": format, "images": 12}
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@every_format
def test_without_soft_labels(tmp_path, format):
    export(make_store(tmp_path / "made", soft=False), tmp_path / "out", format)
    assert "logits" not in (tmp_path / "out" / "README.md").read_text()
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {name.split(".", 1)[1] for name in tar.getnames()} == {"png", "cls", "json"}


def test_the_readme_is_yaml_and_markdown(store, tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface_hub")
    moved = tmp_path / 'a "b": \x7f😀'
    shutil.copytree(store, moved)
    export(moved, tmp_path / "out", "imagefolder")
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["pretty_name"] == moved.name and front["size_categories"] == ["n<1K"]
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "train/**"}]
    assert "| teacher | net\\|x |" in body and "12, 4 a class" in body and "digits" in body


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: flip_bit(next((root / "images").rglob("*.png"))), "png has changed: its sha256"),
        (lambda root: flip_bit(root / "soft_labels" / "000002.safetensors"), "safetensors has changed"),
        (lambda root: next((root / "images").rglob("*.png")).unlink(), "names files that are not there"),
        (lambda root: (root / "manifest.jsonl").write_bytes(b"{}\n"), "manifest.jsonl line 1"),
    ],
)
@every_format
def test_a_damaged_dataset_leaves_nothing(store, tmp_path, spoil, message, format):
    shutil.copytree(store, tmp_path / "made")
    spoil(tmp_path / "made")
    with pytest.raises(InputError, match=message):
        export(tmp_path / "made", tmp_path / "out", format)
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_what_cannot_be_exported(store, tmp_path, monkeypatch):
    unfinished = make_store(tmp_path / "unfinished", finish=False)
    with pytest.raises(InputError, match="is not finished"):
        export(unfinished, tmp_path / "out", "webdataset")
    with pytest.raises(InputError, match="format must be one of webdataset, parquet, imagefolder"):
        export(store, tmp_path / "out", "zip")
    with pytest.raises(InputError, match="at least 1"):
        export(store, tmp_path / "out", "webdataset", images_per_shard=0)
    with pytest.raises(InputError, match="not an empty folder"):
        export(store, unfinished, "webdataset")
    (tmp_path / "link").symlink_to(unfinished, target_is_directory=True)
    with pytest.raises(InputError, match="is a link or a mount point"):
        export(store, tmp_path / "link", "webdataset")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'bnfuse\[parquet\]'"):
        export(store, tmp_path / "out", "parquet")
    assert not (tmp_path / "out").exists()


def test_what_does_not_read_back_is_no_export(store, tmp_path, monkeypatch):
    write = exporting._add
    spoilt = lambda tar, name, data: write(tar, name, b"?" + data[1:] if name == "01-000002.png" else data)
    monkeypatch.setattr(exporting, "_add", spoilt)
    with pytest.raises(InputError, match="of 12 images 11 read back"):
        export(store, tmp_path / "out", "webdataset")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ("while it is written", "before it is named"))
@every_format
def test_killed_it_leaves_nothing_under_its_name_and_begins_afresh(store, tmp_path, format, moment):
    read, calls = exporting._Samples._whole_file, []

    def read_and_die(self, *arguments):
        calls.append(arguments)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *arguments)

    child = os.fork()
    if not child:
        if moment == "before it is named":
            exporting.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        else:
            exporting._Samples._whole_file = read_and_die
        try:
            export(store, tmp_path / "out", format, images_per_shard=3)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.bnfuse-export" and any(left.iterdir())
    export(store, tmp_path / "out", format, images_per_shard=3)
    export(store, tmp_path / "again", format, images_per_shard=3)
    assert files(tmp_path / "out") == files(tmp_path / "again") and not left.exists()


def test_a_second_process_is_told_to_wait(store, tmp_path):
    (tmp_path / ".out.bnfuse-export").mkdir()
    with locked_folder(tmp_path / ".out.bnfuse-export", ""), pytest.raises(InputError, match="another process is exporting"):
        export(store, tmp_path / "out", "webdataset")


def test_command(store, tmp_path, capsys):
    assert main(["export", str(store), "--format", "webdataset", str(tmp_path / "out"), "--images-per-shard", "6"]) == 0
    text = capsys.readouterr().out
    assert "12 images in 4 files" in text and str(tmp_path / "out") in text  # two shards, the card, the README
    assert main(["export", str(tmp_path / "nowhere"), "--format", "webdataset", str(tmp_path / "x")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    with tarfile.open(tmp_path / "out" / "train-000001.tar") as tar:
        assert Image.open(io.BytesIO(tar.extractfile(tar.getnames()[0]).read())).size == (7, 5)
