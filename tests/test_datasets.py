"""Datasets: every kind of source gives the right pixels and labels, and every bad one an error that says what to do."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real_data import real_data
from torch.utils.data import DataLoader
from torchvision_shim import import_torchvision

from bnfuse.datasets import ArrayDataset, EncodedDataset, FolderDataset, class_counts, load_dataset
from bnfuse.decoding import EncodedBytes
from bnfuse.errors import InputError
from bnfuse.store import ImageRecord, Store


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes, `b` with 2 and `a` with 3 RGB images of 6x4 pixels (width x height)."""
    root = tmp_path / "photos"
    for name, count in (("b", 2), ("a", 3)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pixels(4, 6, 3, seed=10 * ord(name) + i)).save(root / name / f"{i}.png")
    return root


class TestArrays:
    def test_items_and_batches(self):
        images, labels = pixels(5, 4, 6, 3), [0, 1, 1, 0, 2]
        dataset = ArrayDataset(images, labels, ["x", "y", "z"], name="some")
        assert (len(dataset), dataset.num_classes, dataset.image_shape, dataset.nbytes) == (5, 3, (3, 4, 6), 360)
        assert dataset.labels.dtype == torch.int64 and class_counts(dataset).tolist() == [2, 2, 1]
        image, label = dataset[4]
        assert image.dtype == torch.float32 and image.is_contiguous() and label == 2 and type(label) is int
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), images[4])
        stacked, of = dataset.batch([4, 0])
        assert torch.equal(stacked[0], image) and stacked.is_contiguous() and of.tolist() == [2, 0]
        assert dataset.images.dtype == torch.uint8 and dataset.in_memory() is dataset
        with pytest.raises(IndexError):
            dataset[5]

    def test_grey_without_channel_axis(self):
        dataset = ArrayDataset(pixels(3, 4, 6), [0, 0, 1])
        assert dataset.images.shape == (3, 4, 6, 1) and dataset.class_names == ["0", "1"]

    def test_read_only_arrays_and_slices(self):
        images = pixels(6, 4, 6, 3)
        images.setflags(write=False)
        assert np.array_equal(ArrayDataset(images[::2, :, ::-1], [0, 0, 0]).images.numpy(), images[::2, :, ::-1])

    def test_the_first_of_each_class(self):
        labels = [1, 0, 1, 2, 0, 1, 2]
        dataset = ArrayDataset(pixels(7, 4, 6, 3), labels, ["x", "y", "z"], soft_labels=torch.arange(7.0)[:, None], name="d")
        part = dataset.first_per_class(2)
        assert part.soft_labels[:, 0].tolist() == [0, 1, 2, 3, 4, 6] and part.labels.tolist() == [1, 0, 1, 2, 0, 2]
        assert torch.equal(part.images, dataset.images[[0, 1, 2, 3, 4, 6]]) and part.class_names == dataset.class_names
        assert dataset.first_per_class(1).soft_labels[:, 0].tolist() == [0, 1, 3] and len(dataset) == 7
        with pytest.raises(InputError, match=r"d has fewer than 3 images of the classes 'x' \(2\), 'z' \(2\): ask for"):
            dataset.first_per_class(3)
        with pytest.raises(InputError, match="must be 1 or more, got 0"):
            dataset.first_per_class(0)

    def test_subset_keeps_names_labels_and_soft_labels(self):
        soft = torch.randn(4, 2, dtype=torch.float16)
        dataset = ArrayDataset(pixels(4, 2, 2), [0, 1, 0, 1], ["x", "y"], soft_labels=soft)
        part = dataset.subset(torch.tensor([3, 0]))
        assert part.class_names == ["x", "y"] and part.labels.tolist() == [1, 0] and len(dataset) == 4
        assert torch.equal(part.soft_labels, soft[[3, 0]].float()) and part.soft_labels.dtype == torch.float32
        assert torch.equal(part[0][0], dataset[3][0])
        assert len(dataset.subset([])) == 0
        for bad in ([4], [-1], [True, False], [0.5], [[0]]):
            with pytest.raises(InputError, match="indices"):
                dataset.subset(bad)

    def test_with_classes_renumbers_in_the_order_given(self):
        soft = torch.arange(12.0).reshape(4, 3)
        dataset = ArrayDataset(pixels(4, 2, 2), [0, 1, 2, 1], ["x", "y", "z"], soft_labels=soft)
        part = dataset.with_classes(["z", "y"])
        assert part.class_names == ["z", "y"] and part.labels.tolist() == [1, 0, 1]
        assert part.soft_labels.tolist() == [[5, 4], [8, 7], [11, 10]]
        for bad in (["w"], ["x", "x"], []):
            with pytest.raises(InputError, match="it has x, y, z"):
                dataset.with_classes(bad)

    def test_soft_labels_over_other_outputs_are_not_cut(self):
        dataset = ArrayDataset(pixels(2, 2, 2), [0, 1], ["x", "y"], soft_labels=torch.zeros(2, 1000))
        with pytest.raises(InputError, match="1000 outputs"):
            dataset.with_classes(["x"])

    @pytest.mark.parametrize(
        "images, labels, names, message",
        [
            (pixels(2, 4, 4, 3).astype(np.float32), [0, 0], None, "must be uint8, got float32"),
            (pixels(2, 3, 4, 4), [0, 0], None, r"1 or 3 channels.*\[2, 3, 4, 4\]"),
            (pixels(2, 4), [0, 0], None, r"\[N, H, W, C\]"),
            (pixels(2, 4, 4, 3), [0], None, "2 images and 1 labels"),
            (pixels(2, 4, 4, 3), [0.0, 1.0], None, "whole numbers"),
            (pixels(2, 4, 4, 3), [0, 5], ["x", "y"], "image 1 has label 5, expected 0 to 1 for 2 classes"),
            (pixels(2, 4, 4, 3), [-1, 0], None, "image 0 has label -1"),
        ],
    )
    def test_what_does_not_fit_is_named(self, images, labels, names, message):
        with pytest.raises(InputError, match=message):
            ArrayDataset(images, labels, names)


class TestFolder:
    def test_classes_are_sorted_and_pixels_exact(self, folder):
        dataset = load_dataset(str(folder))
        assert isinstance(dataset, FolderDataset) and dataset.name == "photos"
        assert dataset.class_names == ["a", "b"] and dataset.labels.tolist() == [0, 0, 0, 1, 1]
        expected = pixels(4, 6, 3, seed=10 * ord("b"))
        assert np.array_equal((dataset[3][0] * 255).round().byte().permute(1, 2, 0).numpy(), expected)

    def test_agrees_with_image_folder(self, folder):
        torchvision = import_torchvision()
        theirs = torchvision.datasets.ImageFolder(str(folder), torchvision.transforms.ToTensor())
        ours = FolderDataset(folder)
        assert theirs.classes == ours.class_names
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(ours, theirs))

    def test_in_memory_and_workers_give_the_same(self, folder):
        lazy = FolderDataset(folder)
        fast = lazy.in_memory()
        assert isinstance(fast, ArrayDataset) and fast.class_names == lazy.class_names and fast.name == lazy.name
        ((images, labels),) = DataLoader(pickle.loads(pickle.dumps(lazy)), batch_size=5)
        assert torch.equal(images, fast.batch(range(5))[0]) and torch.equal(labels, fast.labels)

    def test_classes_are_renumbered(self, folder):
        dataset = load_dataset(str(folder), classes=["b", "a"])
        assert dataset.class_names == ["b", "a"] and dataset.labels.tolist() == [0, 0, 1, 1, 1]
        assert load_dataset(str(folder), classes=["b"]).labels.tolist() == [0, 0]
        assert FolderDataset(folder).subset([4, 0]).sources[0].name == "1.png"
        with pytest.raises(InputError, match="no class called 'c'; it has a, b"):
            load_dataset(str(folder), classes=["c"])

    @pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"])
    def test_formats(self, tmp_path, suffix):
        (tmp_path / "a").mkdir()
        Image.fromarray(pixels(4, 6, 3)).save(tmp_path / "a" / f"1{suffix}")
        assert FolderDataset(tmp_path)[0][0].shape == (3, 4, 6)

    def test_hidden_files_and_other_files_are_ignored_and_links_followed(self, folder, tmp_path):
        (folder / ".cache").mkdir()
        (folder / "notes.txt").write_text("x")
        (folder / "a" / ".hidden.png").write_bytes(b"x")
        (folder / "a" / "Thumbs.db").write_bytes(b"x")
        (folder / "a" / "deeper").mkdir()
        (folder / "a" / "0.png").rename(folder / "a" / "deeper" / "0.png")
        (tmp_path / "elsewhere").mkdir()
        Image.fromarray(pixels(4, 6, 3)).save(tmp_path / "elsewhere" / "1.png")
        (folder / "c").symlink_to(tmp_path / "elsewhere")
        dataset = FolderDataset(folder)
        assert dataset.class_names == ["a", "b", "c"] and class_counts(dataset).tolist() == [3, 2, 1]

    @pytest.mark.parametrize("size, crop", [((4, 4), (0, 1)), ((2, 6), (1, 0))])
    def test_crop_is_central(self, folder, size, crop):
        whole, part = FolderDataset(folder)[0][0], FolderDataset(folder, image_size=size)[0][0]
        top, left = crop
        assert torch.equal(part, whole[:, top : top + size[0], left : left + size[1]])

    def test_resize_is_antialiased(self, tmp_path):
        (tmp_path / "a").mkdir()
        stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
        Image.fromarray(stripes).save(tmp_path / "a" / "stripes.png")
        small = FolderDataset(tmp_path, image_size=(8, 8))[0][0]
        assert small.shape == (1, 8, 8) and (small - 0.5).abs().max() < 0.1

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
    def test_any_size_becomes_any_size(self, height, width, new_height, new_width):
        buffer = io.BytesIO()
        Image.new("L", (width, height), 77).save(buffer, format="PNG")
        data = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
        dataset = EncodedDataset("x", [EncodedBytes(data, "x", 0)], [0], ["a"], image_size=(new_height, new_width))
        assert dataset.read(0).shape == (1, new_height, new_width) and (dataset.read(0) == 77).all()

    def test_channels(self, tmp_path):
        for k, mode in enumerate(["L", "RGB", "RGBA", "P", "1", "CMYK"]):
            (tmp_path / f"{k}").mkdir()
            Image.new(mode, (4, 4)).save(tmp_path / f"{k}" / f"x.{'tif' if mode == 'CMYK' else 'png'}")
        assert {image.shape for image, _ in FolderDataset(tmp_path)} == {(3, 4, 4)}
        assert {image.shape for image, _ in FolderDataset(tmp_path, channels=1)} == {(1, 4, 4)}
        assert FolderDataset(tmp_path, classes=["0", "4"]).image_shape == (1, 4, 4)

    def test_colour_among_grey_is_not_lost_in_silence(self, tmp_path):
        (tmp_path / "a").mkdir()
        Image.new("L", (4, 4)).save(tmp_path / "a" / "1.png")
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / "2.png")
        with pytest.raises(InputError, match="2.png is in colour.*give channels"):
            FolderDataset(tmp_path)[1]

    def test_deep_pixels_are_not_clipped_in_silence(self, tmp_path):
        (tmp_path / "a").mkdir()
        Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "a" / "scan.png")
        with pytest.raises(InputError, match="scan.png has more than 8 bits"):
            FolderDataset(tmp_path)

    def test_sizes_that_differ(self, folder):
        Image.new("RGB", (5, 5)).save(folder / "b" / "9.png")
        with pytest.raises(InputError, match="9.png is 5x5 pixels and .*0.png is 4x6: give an image_size"):
            FolderDataset(folder)[5]
        assert FolderDataset(folder, image_size=(3, 3))[5][0].shape == (3, 3, 3)

    @pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "gone"])
    def test_damaged_files_are_named(self, folder, damage):
        dataset = FolderDataset(folder)
        path = folder / "b" / "1.png"
        data = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"GIF87a??", "empty": b""}[damage])
        with pytest.raises(InputError, match="b/1.png cannot be decoded"):
            dataset[4]
        assert dataset[3][1] == 1

    @pytest.mark.filterwarnings("ignore:.*:UserWarning")  # PIL's, of tags that make no sense
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 200), st.integers(0, 255), st.sampled_from(["PNG", "BMP", "TIFF", "WEBP", "GIF"]))
    def test_no_damage_raises_anything_else(self, at, byte, kind):
        buffer = io.BytesIO()
        Image.fromarray(pixels(4, 6, 3)).save(buffer, format=kind)
        data = bytearray(buffer.getvalue())
        data[at % len(data)] = byte
        try:
            EncodedDataset("x", [EncodedBytes(np.frombuffer(bytes(data), np.uint8), "x", 0)], [0], ["a"]).read(0)
        except InputError as error:
            assert "image 0 of x" in str(error)

    def test_folders_without_images(self, folder, tmp_path):
        (folder / "c").mkdir()
        with pytest.raises(InputError, match="photos/c holds no image"):
            load_dataset(str(folder))
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="empty holds no folders"):
            load_dataset(str(tmp_path / "empty"))
        with pytest.raises(InputError, match="a holds images, but no folders"):
            load_dataset(str(folder / "a"))
        with pytest.raises(InputError, match="a folder has no splits"):
            load_dataset(f"{folder}:train")


class TestSpec:
    @pytest.mark.parametrize("spec", ["", "nowhere", "./digits", "no/such.npz", "no/such.npz:train"])
    def test_no_such_dataset(self, spec, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=r"digits\[:train\|:test\]"):
            load_dataset(spec)

    @pytest.mark.parametrize("spec", ["digits:val", "cifar10:valid"])
    def test_unknown_split(self, spec):
        with pytest.raises(InputError, match="unknown split 'val"):
            load_dataset(spec)

    def test_other_files(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"x")
        with pytest.raises(InputError, match="neither a folder nor an .npz file"):
            load_dataset(str(tmp_path / "x.tar"))

    @pytest.mark.parametrize("options", [{"channels": 4}, {"image_size": 32}, {"image_size": (0, 8)}])
    def test_bad_options(self, options):
        with pytest.raises(InputError, match="channels must|image_size must"):
            load_dataset("digits", **options)


class TestDigits:
    def test_splits_are_stratified_disjoint_and_fixed(self):
        pytest.importorskip("sklearn.datasets")
        whole, train, test = (load_dataset(f"digits{split}") for split in ("", ":train", ":test"))
        assert (len(whole), len(train), len(test)) == (1797, 1438, 359) and whole.image_shape == (1, 8, 8)
        assert torch.equal(class_counts(train) + class_counts(test), class_counts(whole))
        digest = hashlib.sha256(test.images.numpy().tobytes()).hexdigest()
        assert digest.startswith("2f5eb12f1dfec8a2"), "the test split has changed: earlier figures no longer compare"
        ours = {image.numpy().tobytes() for image in train.images}
        assert not any(image.numpy().tobytes() in ours for image in test.images)
        assert int(whole.images.max()) == 255 and test.name == "digits:test"

    def test_options(self):
        pytest.importorskip("sklearn")
        dataset = load_dataset("digits:test", image_size=(16, 12), channels=3, classes=["7", "2"])
        assert dataset.image_shape == (3, 16, 12) and dataset.class_names == ["7", "2"]
        assert torch.equal(dataset[0][0][0], dataset[0][0][2]) and set(dataset.labels.tolist()) == {0, 1}


class TestNpz:
    def save(self, tmp_path, **arrays) -> str:
        np.savez(tmp_path / "set.npz", **arrays)
        return str(tmp_path / "set.npz")

    def test_arrays(self, tmp_path):
        images = pixels(3, 4, 6)
        dataset = load_dataset(self.save(tmp_path, images=images, labels=np.array([1, 0, 1], dtype=np.uint8)))
        assert dataset.image_shape == (1, 4, 6) and dataset.class_names == ["0", "1"] and dataset.name == "set.npz"
        spec = self.save(tmp_path, images=images, labels=[1, 0, 1], class_names=["cat", "dog", "cow"])
        assert load_dataset(spec).class_names == ["cat", "dog", "cow"]
        as_bytes = self.save(tmp_path, images=images, labels=[1, 0, 1], class_names=np.array([b"cat", b"dog", b"cow"]))
        assert load_dataset(as_bytes).class_names == ["cat", "dog", "cow"]
        assert load_dataset(spec, classes=["dog"], image_size=(2, 2)).image_shape == (1, 2, 2)

    def test_encoded(self, tmp_path):
        files = []
        for i in range(3):
            buffer = io.BytesIO()
            Image.fromarray(pixels(4, 6, 3, seed=i)).save(buffer, format="PNG")
            files.append(buffer.getvalue())
        data = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays = {"test_bytes": data, "test_offsets": np.cumsum([0, *map(len, files)]), "test_labels": [0, 1, 0]}
        spec = self.save(tmp_path, **arrays, train_bytes=data, train_labels=[4, 0, 0])
        dataset = load_dataset(f"{spec}:test")
        assert dataset.num_classes == 5 and dataset.labels.tolist() == [0, 1, 0] and dataset.name == "set.npz:test"
        assert np.array_equal(dataset.read(2).permute(1, 2, 0).numpy(), pixels(4, 6, 3, seed=2))
        assert load_dataset(f"{spec}:test", classes=["1"]).labels.tolist() == [0]
        for bad, message in (
            (spec, "its splits are .*:test"),
            (f"{spec}:val", "no split 'val'"),
            (f"{spec}:train", "lacks train_offsets"),
        ):
            with pytest.raises(InputError, match=message):
                load_dataset(bad)
        for offsets in ([0, 1, 2, 10**9], [5, 4, 3, 2], [0.0, 1, 2, 3], [0]):
            spec = self.save(tmp_path, **{**arrays, "test_offsets": np.array(offsets)})
            with pytest.raises(InputError, match="offsets"):
                load_dataset(f"{spec}:test")
        arrays["test_bytes"] = np.where(np.arange(len(data)) > 40, 0, data).astype(np.uint8)
        spec = self.save(tmp_path, **arrays)
        with pytest.raises(InputError, match="image 1 of set.npz:test cannot be decoded"):
            load_dataset(f"{spec}:test").read(1)

    @pytest.mark.parametrize(
        "arrays, message",
        [
            ({"images": pixels(2, 4, 4, 3).astype(np.int64), "labels": [0, 0]}, "must be uint8, got int64"),
            ({"images": pixels(2, 4, 4, 5), "labels": [0, 0]}, "1 or 3 channels"),
            ({"images": pixels(2, 4, 4, 3)}, "lacks labels; it holds images"),
            ({"data": pixels(2, 4, 4, 3)}, "has no `images`; it holds data"),
            ({"images": pixels(0, 4, 4), "labels": np.zeros(0, dtype=int)}, "has no image"),
            ({"images": pixels(2, 4, 4), "labels": [0, 2], "class_names": ["a", "b"]}, "image 1 has label 2"),
            ({"images": pixels(2, 4, 4), "labels": np.array([0, "x"], dtype=object)}, "cannot be read.*allow_pickle"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path, arrays, message):
        with pytest.raises(InputError, match=message):
            load_dataset(self.save(tmp_path, **arrays))

    def test_other_content(self, tmp_path):
        path = tmp_path / "set.npz"
        np.save(tmp_path / "x.npy", pixels(2))
        whole = io.BytesIO()
        np.savez_compressed(whole, images=pixels(64, 8, 8), labels=np.zeros(64, dtype=int))
        flipped = bytearray(whole.getvalue())
        flipped[len(flipped) // 2] ^= 255
        for content in (b"", b"PK\x03\x04", (tmp_path / "x.npy").read_bytes(), whole.getvalue()[:-100], bytes(flipped)):
            path.write_bytes(content)
            with pytest.raises(InputError, match="cannot be read as an .npz file"):
                load_dataset(str(path))


class TestCifar10:
    def test_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BNFUSE_DATA", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        with pytest.raises(InputError) as error:
            load_dataset("cifar10:test")
        for word in ("cifar10_lossless_test.npz", f"{tmp_path}/cifar-10-batches-py", "home/.cache/bnfuse", "download"):
            assert word in str(error.value)

    def test_torchvision_copy(self, tmp_path, monkeypatch):
        torchvision = import_torchvision()
        calls = []

        class Cifar10:
            def __init__(self, root, train, download):
                calls.append((root, train, download))
                self.data, self.targets = pixels(4, 32, 32, 3), [0, 9, 3, 3]

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar10)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("BNFUSE_DATA", raising=False)
        root = tmp_path / ".cache" / "bnfuse"
        dataset = load_dataset("cifar10", download=True, classes=["cat"])
        assert calls == [(str(root), True, True), (str(root), False, True)] and len(dataset) == 4
        (root / "cifar-10-batches-py").mkdir(parents=True)
        load_dataset("cifar10:test", download=True)
        assert calls[2] == (str(root), False, False)

    def test_damaged_torchvision_copy(self, tmp_path, monkeypatch):
        import_torchvision()
        monkeypatch.setenv("BNFUSE_DATA", str(tmp_path))
        (tmp_path / "cifar-10-batches-py").mkdir()
        with pytest.raises(InputError, match="cannot be read from .*corrupted"):
            load_dataset("cifar10:train")

    def test_lossless(self, monkeypatch):
        path = real_data("cifar10_lossless_test.npz")
        monkeypatch.setenv("BNFUSE_DATA", str(path.parent))
        dataset = load_dataset("cifar10:test")
        assert len(dataset) == 1017 and dataset.image_shape == (3, 32, 32) and dataset.labels[:3].tolist() == [3, 8, 8]
        assert dataset.class_names[3] == "cat"


class TestRealFiles:
    def test_cifar10_jpeg(self, monkeypatch):
        jpeg = load_dataset(f"{real_data('cifar10_jpeg_bytes.npz')}:test")
        exact = np.load(real_data("cifar10_lossless_test.npz"), allow_pickle=False)
        assert len(jpeg) == 10000 and class_counts(jpeg).tolist() == [1000] * 10
        first = exact["index"][:64]
        images, labels = jpeg.batch(first)
        error = images - torch.from_numpy(exact["images"][:64]).permute(0, 3, 1, 2) / 255
        assert labels.tolist() == exact["labels"][:64].tolist() and -10 * error.square().mean().log10() > 25  # dB

    def test_imagenette(self, tmp_path):
        with zipfile.ZipFile(real_data("imagenette_1200.zip")) as archive:
            for name in archive.namelist()[::40]:
                archive.extract(name, tmp_path)
        dataset = load_dataset(str(tmp_path), image_size=(64, 64))
        assert dataset.num_classes == 10 and dataset.class_names[0] == "n01440764"
        assert dataset.batch(range(4))[0].shape == (4, 3, 64, 64)


class TestStore:
    def write(self, root, *, soft_labels=True, finish=True) -> torch.Tensor:
        images = torch.from_numpy(pixels(6, 3, 4, 6))
        with Store.open(root, card={}, class_names=["b/ad", "also"]) as store:
            for unit, classes in enumerate([(1, 0, 1), (0, 0, 1)]):
                index = list(store.counts)
                records = []
                for k in classes:
                    records.append(ImageRecord(k, index[k], 0, {}))
                    index[k] += 1
                logits = torch.tensor([[10.0 * unit + i, 0.5] for i in range(3)])
                store.commit(unit, images[3 * unit : 3 * unit + 3], records, logits if soft_labels else None)
            if finish:
                store.finish()
        return images

    def test_manifest_order_with_soft_labels(self, tmp_path):
        images = self.write(tmp_path / "made")
        dataset = load_dataset(str(tmp_path / "made"))
        assert dataset.class_names == ["b/ad", "also"] and dataset.labels.tolist() == [1, 0, 1, 0, 0, 1]
        assert torch.equal(torch.stack([dataset.read(i) for i in range(6)]), images)
        assert dataset.soft_labels.dtype == torch.float32
        assert dataset.soft_labels[:, 0].tolist() == [0, 1, 2, 10, 11, 12]
        part = dataset.subset([5, 1]).in_memory()
        assert part.soft_labels[:, 0].tolist() == [12, 1] and torch.equal(part.read(0), images[5])
        assert load_dataset(str(tmp_path / "made"), classes=["also"]).labels.tolist() == [0, 0, 0]

    def test_unfinished(self, tmp_path):
        self.write(tmp_path / "made", soft_labels=False, finish=False)
        with pytest.warns(UserWarning, match="not finished: 6 images"):
            assert load_dataset(str(tmp_path / "made")).soft_labels is None

    def test_missing_file(self, tmp_path):
        self.write(tmp_path / "made")
        next((tmp_path / "made" / "images").rglob("*.png")).unlink()
        with pytest.raises(InputError, match="files that are not there"):
            load_dataset(str(tmp_path / "made"))
