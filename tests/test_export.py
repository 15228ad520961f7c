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
from torchvision_shim import import_torchvision

from bnfuse import InputError, exporting
from bnfuse.cli import main
from bnfuse.exporting import FORMATS, export
from bnfuse.files import locked_folder
from bnfuse.manifest import read_store
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
    from safetensors.torch import load_file

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
