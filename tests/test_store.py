"""The store: what is committed stays whatever happens, what is not leaves no trace, and every refusal says why.

Run as a script, this file is the process that the crash tests kill: see `nursery`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision_shim import import_torchvision

from bnfuse.datasets import load_dataset
from bnfuse.errors import InputError
from bnfuse.manifest import class_folder, read_store, verify
from bnfuse.store import ImageRecord, Store, write_store

NAMES = ["cat", "../dog", "a/b"]
CARD = {"config": {"lr": 0.1, "losses": {"bn": "l2"}, "size": [4, 6]}, "teacher": {"sha256": "ab"}}
UNITS = 6


def unit(number: int) -> tuple[torch.Tensor, list[ImageRecord], torch.Tensor]:
    """Unit `number` of the dataset that these tests make: two images of each class, the same at every call."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (6, 3, 4, 6), dtype=torch.uint8, generator=generator)
    records = [
        ImageRecord(k, 2 * number + i, 1000 * number + 10 * k + i, {"bn": 0.5 / (number + 1), "ce": float(i)})
        for k in range(3)
        for i in range(2)
    ]
    return images, records, torch.randn(6, 3, generator=generator)


def write(root: Path, units: int = UNITS, *, finish: bool = True) -> None:
    """What a driver does: make every unit that is not there yet."""
    with Store.open(root, card=CARD, class_names=NAMES) as store:
        for number in range(units):
            if number not in store.done:
                store.commit(number, *unit(number))
        if finish:
            store.finish()


def write_with_ranks(root: Path, units: int = UNITS, *, ranks: int = 3, finish: bool = True) -> None:
    """The same by several ranks, one after the other in this process, the last one first."""
    with Store.open(root, card=CARD, class_names=NAMES) as store:
        todo = [number for number in range(units) if number not in store.done]
        for rank in reversed(range(ranks)):
            if rank == 0:
                for number in todo[::ranks]:
                    store.commit(number, *unit(number))
            elif todo[rank::ranks]:
                with Store.join(root, rank, store.done) as shard:
                    for number in todo[rank::ranks]:
                        shard.commit(number, *unit(number))
        if finish:
            store.finish()


def tree(root: Path) -> dict[str, bytes]:
    """Every file below root, hidden ones too, and its bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """Flushing guards against a loss of power, which no test can bring about, and would take most of the time here.
    `TestCrash.test_everything_is_flushed_before_it_is_named` sees to it that it happens, and when."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def whole(tmp_path) -> Path:
    write(tmp_path / "whole")
    return tmp_path / "whole"


class TestLayout:
    def test_files(self, whole):
        files = tree(whole)
        folders = ["00-cat", "01-dog", "02-a-b"]
        images = {f"images/{folder}/{folder[:2]}-{i:06d}.png" for folder in folders for i in range(2 * UNITS)}
        labels = {f"soft_labels/{i:06d}.safetensors" for i in range(UNITS)}
        assert set(files) == images | labels | {"card.json", "manifest.jsonl"}
        card = json.loads(files["card.json"])
        assert card["complete"] and card["counts"] == [12, 12, 12] and card["class_names"] == NAMES
        assert card["config"] == CARD["config"] and card["versions"]["torch"] == torch.__version__
        line = json.loads(files["manifest.jsonl"].splitlines()[7])
        assert list(line) == [
            "id",
            "file",
            "class_index",
            "class_name",
            "index",
            "seed",
            "unit",
            "unit_size",
            "losses",
            "sha256",
            "soft_labels",
        ]
        assert line["sha256"] == hashlib.sha256(files[line["file"]]).hexdigest()
        assert line["soft_labels"]["row"] == 1 and line["seed"] == 1001 and line["losses"] == {"bn": 0.25, "ce": 1.0}

    def test_reads_back_exactly(self, whole):
        contents = read_store(whole)
        assert contents.complete and contents.class_names == NAMES and verify(whole) == []
        images, records, logits = unit(2)
        for row, entry in enumerate(contents.entries[12:18]):
            with Image.open(whole / entry.file) as image:
                assert image.mode == "RGB" and image.tobytes() == images[row].permute(1, 2, 0).numpy().tobytes()
            assert (entry.class_index, entry.index, entry.seed, entry.losses) == (
                records[row].class_index,
                records[row].index,
                records[row].seed,
                records[row].losses,
            )
        assert torch.equal(contents.soft_labels()[12:18], logits.half().float())

    def test_grey(self, tmp_path):
        image = torch.arange(24, dtype=torch.uint8).reshape(1, 1, 4, 6)
        with Store.open(tmp_path / "grey", card={}, class_names=["x"]) as store:
            store.commit(0, image, [ImageRecord(0, 0, 0, {})])
        (path,) = (tmp_path / "grey" / "images").rglob("*.png")
        with Image.open(path) as read:
            assert read.mode == "L" and read.size == (6, 4) and read.tobytes() == bytes(range(24))
        assert read_store(tmp_path / "grey").soft_labels() is None

    def test_image_folder_reads_it_in_class_order(self, tmp_path):
        torchvision = import_torchvision()
        names = ["zebra", *(f"k{k}" for k in range(1, 11)), "aardvark"]  # more than ten, and not in order
        with Store.open(tmp_path / "made", card={}, class_names=names) as store:
            images = torch.stack([torch.full((3, 2, 2), k, dtype=torch.uint8) for k in range(12)])
            store.commit(0, images, [ImageRecord(k, 0, 0, {}) for k in range(12)])
        dataset = torchvision.datasets.ImageFolder(str(tmp_path / "made" / "images"))
        assert [image.getpixel((0, 0))[0] for image, _ in dataset] == [label for _, label in dataset] == list(range(12))

    def test_losses_that_are_not_numbers_are_kept(self, tmp_path):
        with Store.open(tmp_path / "made", card={}, class_names=["x"]) as store:
            losses = {"bn": float("nan"), "ce": float("-inf"), "tv": 0.1}
            store.commit(0, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [ImageRecord(0, 0, 0, losses)])
        text = (tmp_path / "made" / "manifest.jsonl").read_text()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert str(read_store(tmp_path / "made").entries[0].losses) == str(losses)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        names=st.lists(
            st.one_of(
                st.text(st.characters(exclude_categories=()), max_size=12),
                st.sampled_from(["", ".", "..", "../x", "a/b", "/etc", "a\\b", "x\0y", "猫", "é", "CAT", "cat", "a" * 999]),
            ),
            min_size=1,
            max_size=12,
        )
    )
    def test_no_class_name_is_a_path(self, tmp_path_factory, names):
        root = tmp_path_factory.mktemp("names") / "made"
        images = torch.zeros(len(names), 1, 1, 1, dtype=torch.uint8)
        with Store.open(root, card={}, class_names=names) as store:
            store.commit(0, images, [ImageRecord(k, 0, 0, {}) for k in range(len(names))])
            store.finish()
        assert {path.name for path in root.parent.iterdir()} == {"made"}
        folders = sorted(path.name for path in (root / "images").iterdir())
        assert folders == [class_folder(k, name, len(names)) for k, name in enumerate(names)]
        assert len({folder.lower() for folder in folders}) == len(names) and max(map(len, folders)) <= 43
        assert all(folder.isascii() and folder.replace("-", "").isalnum() for folder in folders)
        assert [entry.class_index for entry in read_store(root).entries] == list(range(len(names)))
        assert verify(root) == []

    def test_folders_sort_as_classes_do(self):
        for count in (1, 10, 11, 100, 101, 1000):
            folders = [class_folder(k, "x", count) for k in range(count)]
            assert folders == sorted(folders)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a process of its own found, in which writers were killed: see `nursery`."""
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, here, tmp_path_factory.mktemp("nursery")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestCrash:
    """Killed at any moment and resumed, a run ends with the bytes of one that was never killed."""

    def test_killed_at_random_moments(self, found):
        assert found["killed"] == 10 and found["same"]
        assert found["progress"] == sorted(found["progress"]), "committed units were lost"

    def test_killed_at_every_step(self, found):
        """At each write, flush, rename, truncation and removal in turn, some writes done only by half."""
        assert found["steps"] > 40 and found["differ"] == []

    def test_killed_at_every_step_of_several_ranks(self, found):
        """Also at every step of folding their shards into one manifest, when the store is opened, and when it is finished."""
        assert found["steps_of_ranks"] > 80 and found["ranks_differ"] == []

    def test_everything_is_flushed_before_it_is_named(self, tmp_path, monkeypatch):
        root = tmp_path / "made"
        events = []  # (call, path relative to the store)
        genuine = {name: getattr(os, name) for name in ("fsync", "replace", "write")}

        def path_of(descriptor: int) -> str:
            """By its inode, which a temporary file keeps when it is renamed."""
            wanted = os.fstat(descriptor).st_ino
            (path,) = [path for path in (root, *root.rglob("*")) if path.stat().st_ino == wanted]
            return path.relative_to(root).as_posix()

        def flush(descriptor):
            events.append(("fsync", path_of(descriptor)))

        def rename(source, target):
            events.append(("replace", Path(target).relative_to(root).as_posix()))
            assert events[-2] == ("fsync", Path(source).relative_to(root).as_posix())
            genuine["replace"](source, target)

        def append(descriptor, data):
            events.append(("write", path_of(descriptor)))
            return genuine["write"](descriptor, data)

        with Store.open(root, card=CARD, class_names=NAMES) as store:
            for name, call in (("fsync", flush), ("replace", rename), ("write", append)):
                monkeypatch.setattr(os, name, call)
            store.commit(0, *unit(0))
            (at,) = [i for i, (call, _) in enumerate(events) if call == "write"]
            assert events[at:] == [("write", "manifest.jsonl"), ("fsync", "manifest.jsonl")]
            renamed = {path: i for i, (call, path) in enumerate(events) if call == "replace"}
            assert set(renamed) == set(tree(root)) - {"manifest.jsonl", "card.json"}
            for path, i in renamed.items():
                for folder in (Path(path).parent, Path(path).parents[-1]):
                    assert ("fsync", folder.as_posix()) in events[i:at]
            store.finish()
        assert events[-2:] == [("replace", "card.json"), ("fsync", ".")]


class TestResume:
    def test_done_and_counts(self, tmp_path):
        write(tmp_path / "made", 2, finish=False)
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES) as store:
            assert store.done == {0, 1} and store.counts == [4, 4, 4] and not store.complete
        write(tmp_path / "made")
        write(tmp_path / "made")  # a finished one is left as it is
        write(tmp_path / "other")
        assert tree(tmp_path / "made") == tree(tmp_path / "other")

    @pytest.mark.parametrize("lost", [1, 20, 500, 2000])
    def test_torn_end(self, tmp_path, whole, lost):
        root = tmp_path / "made"
        write(root, 4, finish=False)
        manifest = root / "manifest.jsonl"
        manifest.write_bytes(manifest.read_bytes()[:-lost])
        assert {entry.unit for entry in read_store(root).entries} == {0, 1, 2}
        assert any("line" in problem for problem in verify(root))
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            assert store.done == {0, 1, 2}
            assert not (root / "soft_labels" / "000003.safetensors").exists()
            assert len(list(root.rglob("*.png"))) == 18
        write(root)
        assert tree(root) == tree(whole)

    @pytest.mark.parametrize("count", [1, 5])
    def test_unit_that_lacks_lines(self, tmp_path, count):
        root = tmp_path / "made"
        write(root, 2, finish=False)
        lines = (root / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        (root / "manifest.jsonl").write_bytes(b"".join(lines[: 6 + count]))
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            assert store.done == {0}
        assert (root / "manifest.jsonl").read_bytes() == b"".join(lines[:6])

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda lines: lines[:8] + [b'{"id": 3\n'] + lines[9:], "line 9"),
            (lambda lines: lines[:8] + [b"\xff\x00\n"] + lines[9:], "line 9"),
            (lambda lines: lines[:8] + [b"[]\n"] + lines[9:], "line 9: not a JSON object"),
            (lambda lines: lines[:8] + [b"{}\n"] + lines[9:], "line 9: it has the fields"),
            (lambda lines: lines[:8] + lines[9:], "line 12: unit 2 begins, but unit 1 lacks lines"),
            (lambda lines: lines[:8] + lines[7:], "line 9: image .* is there twice"),
            (lambda lines: lines[:-1] + [b"nonsense\n"], "line 18"),
            (lambda lines: edited(lines, 8, class_index=3), "line 9: class index 3, but the card names 3"),
            (lambda lines: edited(lines, 8, file="../../etc/passwd"), "line 9: file is '../../etc/passwd', expected"),
            (lambda lines: edited(lines, 8, index=-1), "line 9: index is -1"),
            (lambda lines: edited(lines, 8, unit_size=0), "line 9: unit_size is 0"),
            (lambda lines: edited(lines, 8, losses={"bn": None}), "line 9: losses"),
            (lambda lines: edited(lines, 8, class_name="cow"), "line 9: class_name is 'cow'"),
            (lambda lines: edited(lines, 8, soft_labels={"file": "/x", "row": 0, "sha256": ""}), "line 9: soft_labels"),
            (lambda lines: edited(lines, 8, soft_labels=None), "line 9: some images have soft labels"),
        ],
    )
    def test_damage_in_the_middle_is_never_dropped(self, tmp_path, damage, message):
        root = tmp_path / "made"
        write(root, 3, finish=False)
        lines = (root / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        (root / "manifest.jsonl").write_bytes(b"".join(damage(lines)))
        before = tree(root)
        with pytest.raises(InputError, match=f"manifest.jsonl {message}"):
            read_store(root)
        with pytest.raises(InputError, match="Restore the file from a copy, or delete"):
            Store.open(root, card=CARD, class_names=NAMES)
        assert tree(root) == before

    def test_a_complete_one_may_not_lack_its_end(self, whole):
        data = (whole / "manifest.jsonl").read_bytes()
        (whole / "manifest.jsonl").write_bytes(data[:-5])
        with pytest.raises(InputError, match="line 36: the end is missing"):
            read_store(whole)

    def test_strangers_files_are_left_alone(self, tmp_path):
        root = tmp_path / "made"
        write(root, 1, finish=False)
        ours = [
            "images/00-cat/00-000099.png",
            "images/00-cat/.00-000099.png.tmp",
            "soft_labels/000009.safetensors",
            ".card.json.tmp",
        ]
        theirs = ["images/00-cat/notes.txt", "contact_sheet.png", "soft_labels/README"]
        for file in ours + theirs:
            (root / file).write_bytes(b"x")
        write(root, 1, finish=False)
        assert [file for file in ours if (root / file).exists()] == []
        assert [file for file in theirs if (root / file).exists()] == theirs

    def test_missing_image(self, tmp_path):
        write(tmp_path / "made", 2, finish=False)
        next((tmp_path / "made" / "images").rglob("*-000001.png")).unlink()
        for reading in (lambda: read_store(tmp_path / "made"), lambda: write(tmp_path / "made")):
            with pytest.raises(InputError, match="names files that are not there: images/.*-000001.png"):
                reading()

    def test_other_settings(self, tmp_path):
        root = tmp_path / "made"
        write(root, 1, finish=False)
        before = tree(root)
        card = {"config": {"lr": 0.2, "losses": {"bn": "l1", "tv": 1}, "size": [4, 7]}}
        with pytest.raises(InputError) as error:
            Store.open(root, card=card, class_names=["cat", "dog", "a/b"], counts=[2, 2, 2])
        for line in (
            'class_names[1]: given "dog", the dataset has "../dog"',
            "counts: given [2, 2, 2], the dataset has null",
            "config.lr: given 0.2, the dataset has 0.1",
            'config.losses.bn: given "l1", the dataset has "l2"',
            "config.losses.tv: given 1, the dataset has none",
            "config.size[1]: given 7, the dataset has 6",
            'teacher: not given, the dataset has {"sha256": "ab"}',
            f"Choose another --out, or delete {root}",
        ):
            assert line in str(error.value)
        assert tree(root) == before

    def test_other_version(self, tmp_path, monkeypatch):
        write(tmp_path / "made", 1, finish=False)
        monkeypatch.setattr(torch, "__version__", "9.9")
        with pytest.raises(InputError, match='versions.torch: given "9.9"'):
            write(tmp_path / "made")


class TestRanks:
    """Several ranks write to one store, each to a manifest of its own."""

    def test_the_same_bytes(self, tmp_path, whole):
        for ranks in (2, 3, 9):
            write_with_ranks(tmp_path / str(ranks), ranks=ranks)
            assert tree(tmp_path / str(ranks)) == tree(whole)

    def test_what_readers_see_meanwhile(self, tmp_path):
        root = tmp_path / "made"
        write_with_ranks(root, 4, finish=False)
        assert sorted(path.name for path in root.glob("*.jsonl")) == [
            "manifest.0001.jsonl",
            "manifest.0002.jsonl",
            "manifest.jsonl",
        ]
        assert [entry.unit for entry in read_store(root).entries[::6]] == [0, 3, 1, 2]
        assert verify(root) == ["the dataset is not finished"]

    def test_opening_folds_the_shards_in(self, tmp_path, whole):
        root = tmp_path / "made"
        write_with_ranks(root, 4, finish=False)
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            assert store.done == {0, 1, 2, 3} and store.counts == [8, 8, 8]
            assert [path.name for path in root.glob("*.jsonl")] == ["manifest.jsonl"]
            with pytest.raises(InputError, match="another process is writing to .*manifest.jsonl is locked"):
                Store.open(root, card=CARD, class_names=NAMES)  # the manifest is another file now, and locked too
            assert [entry.unit for entry in read_store(root).entries[::6]] == [0, 1, 2, 3]
            store.commit(4, *unit(4))
        write(root)
        assert tree(root) == tree(whole)

    @pytest.mark.parametrize("lost", [1, 300, 2000])
    def test_torn_shard(self, tmp_path, whole, lost):
        root = tmp_path / "made"
        write_with_ranks(root, 4, finish=False)
        shard = root / "manifest.0002.jsonl"
        shard.write_bytes(shard.read_bytes()[:-lost])
        assert {entry.unit for entry in read_store(root).entries} == {0, 1, 3}
        assert any(f"{shard.name} line" in problem for problem in verify(root)) or lost == 2000
        write_with_ranks(root)
        assert tree(root) == tree(whole)

    def test_damaged_shard_is_never_dropped(self, tmp_path):
        root = tmp_path / "made"
        write_with_ranks(root, 4, finish=False)
        shard = root / "manifest.0001.jsonl"
        shard.write_bytes(b"nonsense\n" + shard.read_bytes())
        before = tree(root)
        with pytest.raises(InputError, match="manifest.0001.jsonl line 1: "):
            Store.open(root, card=CARD, class_names=NAMES)
        assert tree(root) == before

    def test_lines_that_are_folded_in_already_count_once(self, tmp_path, whole):
        root = tmp_path / "made"
        write_with_ranks(root, 4, finish=False)
        shard = (root / "manifest.0001.jsonl").read_bytes()
        write(root, 4, finish=False)
        (root / "manifest.0001.jsonl").write_bytes(shard)
        assert len(read_store(root).entries) == 24 and verify(root) == ["the dataset is not finished"]
        write(root)
        assert tree(root) == tree(whole)

    def test_the_same_unit_with_other_images_is_refused(self, tmp_path):
        root = tmp_path / "made"
        write(root, 2, finish=False)
        lines = (root / "manifest.jsonl").read_bytes().splitlines(keepends=True)[6:]
        (root / "manifest.0001.jsonl").write_bytes(b"".join(edited(lines, 0, sha256="0" * 64)))
        for reading in (lambda: read_store(root), lambda: write(root)):
            with pytest.raises(InputError, match="manifest.0001.jsonl: unit 1 is in another manifest too, with other images"):
                reading()

    def test_a_rank_that_still_writes_is_not_folded_in(self, tmp_path, whole):
        root = tmp_path / "made"
        store = Store.open(root, card=CARD, class_names=NAMES)
        shard = Store.join(root, 1, store.done)
        shard.commit(1, *unit(1))
        with pytest.raises(InputError, match="manifest.0001.jsonl is locked"):
            store.finish()
        store.close()
        with pytest.raises(InputError, match="manifest.0001.jsonl is locked"):
            write(root)
        shard.commit(2, *unit(2))
        shard.close()
        write(root)
        assert tree(root) == tree(whole)

    def test_two_with_one_rank(self, tmp_path):
        with Store.open(tmp_path, card=CARD, class_names=NAMES) as store, Store.join(tmp_path, 1, store.done) as shard:
            with pytest.raises(InputError, match="another process is writing to .*manifest.0001.jsonl"):
                Store.join(tmp_path, 1, store.done)
            shard.commit(0, *unit(0))
            shard.close()
            with pytest.raises(InputError, match="manifest.0001.jsonl holds images of an earlier run"):
                Store.join(tmp_path, 1, store.done)
            with pytest.raises(InputError, match="unit 0 is committed already"):
                Store.join(tmp_path, 2, {0}).commit(0, *unit(0))

    def test_how_far_the_others_are(self, tmp_path):
        with Store.open(tmp_path, card=CARD, class_names=NAMES) as store, Store.join(tmp_path, 1, store.done) as shard:
            assert store.committed_by_others() == 0
            for number in (0, 1):
                shard.commit(number, *unit(number))
                assert store.committed_by_others() == 6 * (number + 1) == store.committed_by_others()

    def test_shards_beside_a_complete_manifest_are_named(self, whole):
        (whole / "manifest.0001.jsonl").write_bytes(b"")
        (whole / "checkpoints").mkdir()
        (whole / "checkpoints" / "000001.safetensors").write_bytes(b"")
        assert len(verify(whole)) == 2 and len(read_store(whole).entries) == 36


def edited(lines: list[bytes], at: int, **fields) -> list[bytes]:
    entry = {**json.loads(lines[at]), **fields}
    entry = {name: value for name, value in entry.items() if value is not None}
    return [*lines[:at], json.dumps(entry).encode() + b"\n", *lines[at + 1 :]]


class TestRefusals:
    def test_second_process(self, tmp_path):
        root = tmp_path / "made"
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            with pytest.raises(InputError, match="another process is writing to .*made"):
                Store.open(root, card=CARD, class_names=NAMES)
            store.commit(0, *unit(0))
        with pytest.raises(InputError, match="closed"):
            store.commit(1, *unit(1))
        write(root)

    def test_a_failed_open_lets_go_of_the_lock(self, tmp_path):
        write(tmp_path / "made", 1, finish=False)
        with pytest.raises(InputError):
            Store.open(tmp_path / "made", card={}, class_names=NAMES)
        write(tmp_path / "made")

    @pytest.mark.parametrize("file", ["thesis.tex", "card.json", ".hidden", "images/cat/1.png"])
    def test_folder_that_is_something_else(self, tmp_path, file):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
        with pytest.raises(InputError, match=f"not empty and is not a bnfuse dataset.*{file.split('/')[0]}"):
            Store.open(tmp_path, card=CARD, class_names=NAMES)
        assert list(tree(tmp_path)) == [file]

    def test_someone_elses_manifest(self, tmp_path):
        (tmp_path / "manifest.jsonl").write_text('{"audio": 1}\n')
        with pytest.raises(InputError, match="not a bnfuse dataset"):
            Store.open(tmp_path, card=CARD, class_names=NAMES)

    def test_file_in_the_way(self, tmp_path):
        (tmp_path / "made").write_text("x")
        for root in (tmp_path / "made", tmp_path / "made" / "below"):
            with pytest.raises(InputError, match="cannot write .*made"):
                Store.open(root, card=CARD, class_names=NAMES)

    def test_empty_folder_is_fine(self, tmp_path):
        write(tmp_path)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"unit": -1}, "unit -1 is negative"),
            ({"unit": 0}, "unit 0 is committed already"),
            ({"images": torch.zeros(6, 3, 4, 6)}, "uint8.*got torch.float32"),
            ({"images": torch.zeros(6, 2, 4, 6, dtype=torch.uint8)}, r"1 or 3 channels, got .*\[6, 2, 4, 6\]"),
            ({"images": torch.zeros(6, 3, 5, 6, dtype=torch.uint8)}, r"images are \[3, 4, 6\], got \[3, 5, 6\]"),
            ({"images": torch.zeros(5, 3, 4, 6, dtype=torch.uint8)}, "5 images and 6 records"),
            ({"records": [ImageRecord(0, 0, 0, {})] * 6}, "class 0 has an image 0 already"),
            ({"records": [ImageRecord(0, 9, 0, {})] * 6}, "class 0 has an image 9 already"),
            ({"records": [ImageRecord(3, 9, 0, {})] * 6}, "does not fit a store of 3 classes"),
            ({"records": [ImageRecord(0, -1, 0, {})] * 6}, "does not fit"),
            ({"soft_labels": None}, "with all units"),
            ({"soft_labels": torch.zeros(5, 3)}, r"\[6, K\], got torch.float32 \[5, 3\]"),
            ({"soft_labels": torch.zeros(6, 3).long()}, "floating-point"),
            ({"soft_labels": torch.full((6, 3), 1e6)}, "finite in float16"),
        ],
    )
    def test_units_that_do_not_fit(self, tmp_path, changes, message):
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES) as store:
            store.commit(0, *unit(0))
            before = tree(tmp_path / "made")
            images, records, soft_labels = unit(1)
            arguments = {"unit": 1, "images": images, "records": records, "soft_labels": soft_labels, **changes}
            with pytest.raises(InputError, match=message):
                store.commit(**arguments)
            assert tree(tmp_path / "made") == before

    @pytest.mark.parametrize(
        "card, names, counts, message",
        [
            ({"complete": True}, ["x"], None, "the store writes complete"),
            ({"x": {1, 2}}, ["x"], None, "JSON's types"),
            ({"x": float("nan")}, ["x"], None, "JSON's types"),
            ({}, [], None, "class_names"),
            ({}, [1], None, "class_names"),
            ({}, ["x"], [1, 2], "counts"),
        ],
    )
    def test_cards_that_do_not_fit(self, tmp_path, card, names, counts, message):
        with pytest.raises(InputError, match=message):
            Store.open(tmp_path / "made", card=card, class_names=names, counts=counts)
        assert not (tmp_path / "made").exists()


class TestFinish:
    def test_nothing_committed(self, tmp_path):
        with pytest.raises(InputError, match="holds no image yet"):
            write(tmp_path / "made", 0)

    def test_counts(self, tmp_path):
        counts = [4, 4, 4]
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES, counts=counts) as store:
            store.commit(0, *unit(0))
            with pytest.raises(InputError, match=r"class 0 \('cat'\): 2 of 4"):
                store.finish()
            store.commit(1, *unit(1))
            store.finish()
            assert store.complete
            with pytest.raises(InputError, match="is complete"):
                store.commit(2, *unit(2))
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES, counts=counts) as store:
            assert store.complete and store.done == {0, 1}

    def test_gaps(self, tmp_path):
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES) as store:
            store.commit(1, *unit(1))
            with pytest.raises(InputError, match="gaps in class 0"):
                store.finish()


class TestDisk:
    """The operating system says no: the message says what and where, and nothing is lost or left lying."""

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
    @pytest.mark.parametrize("call", ["replace", "fsync", "write"])
    def test_commit(self, tmp_path, monkeypatch, whole, call, code):
        root = tmp_path / "made"
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            store.commit(0, *unit(0))
            before = tree(root)
            genuine, calls = getattr(os, call), []

            def refuse(*arguments):
                calls.append(arguments)
                if call == "write" or len(calls) == 4:
                    if call == "write":  # a full disk takes a part
                        genuine(arguments[0], arguments[1][:100])
                    raise OSError(code, os.strerror(code))
                return genuine(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, refuse)
                with pytest.raises(InputError) as error:
                    store.commit(1, *unit(1))
            assert os.strerror(code) in str(error.value) and str(root) in str(error.value)
            assert "The 6 images committed so far are safe" in str(error.value)
            after = tree(root)
            assert not [file for file in after if file.endswith(".tmp")]
            assert {file: after[file] for file in before} == before and store.done == {0}
            for number in range(1, UNITS):
                store.commit(number, *unit(number))
            store.finish()
        assert tree(root) == tree(whole)

    def test_short_write_of_the_manifest(self, tmp_path, monkeypatch):
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES) as store:
            genuine = os.write
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", lambda descriptor, data: genuine(descriptor, data[:100]))
                with pytest.raises(InputError, match="manifest.jsonl: No space left.*free some space"):
                    store.commit(0, *unit(0))
            assert (tmp_path / "made" / "manifest.jsonl").read_bytes() == b""
            store.commit(0, *unit(0))
        assert verify(tmp_path / "made") == ["the dataset is not finished"]

    def test_manifest_that_cannot_be_mended(self, tmp_path, monkeypatch):
        def refuse(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        root = tmp_path / "made"
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            store.commit(0, *unit(0))
            genuine = os.write
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", lambda descriptor, data: genuine(descriptor, data[:100]))
                patch.setattr(os, "ftruncate", refuse)
                with pytest.raises(InputError, match="safe"):
                    store.commit(1, *unit(1))
            with pytest.raises(InputError, match="closed: open it again"):
                store.commit(1, *unit(1))
        with Store.open(root, card=CARD, class_names=NAMES) as store:
            assert store.done == {0}

    def test_interrupt(self, tmp_path, monkeypatch):
        with Store.open(tmp_path / "made", card=CARD, class_names=NAMES) as store:

            def interrupt(*arguments):
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    store.commit(0, *unit(0))
            assert not list((tmp_path / "made").rglob("*.tmp"))
            store.commit(0, *unit(0))

    def test_open_on_a_full_disk(self, tmp_path, monkeypatch):
        def refuse(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(InputError, match="card.json: No space left on device"):
                write(tmp_path / "made")
        write(tmp_path / "made")

    def test_read_only_folder(self, tmp_path):
        if os.geteuid() == 0:
            pytest.skip("root may write to a read-only folder; the tests above simulate the refusal")
        tmp_path.chmod(0o555)
        try:
            with pytest.raises(InputError, match="cannot write .*make it writable"):
                write(tmp_path / "made")
        finally:
            tmp_path.chmod(0o755)

    def test_file_system_without_locks(self, tmp_path, monkeypatch):
        def refuse(*arguments):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.warns(UserWarning, match="no locks"):
            write(tmp_path / "made", 1)


class TestVerify:
    def test_problems(self, whole):
        lines = (whole / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        (whole / "manifest.jsonl").write_bytes(b"".join([*lines, lines[0], b"nonsense\n", b'{"id"']))
        (whole / "images" / "00-cat" / "00-000000.png").write_bytes(b"changed")
        (whole / "images" / "00-cat" / "00-000001.png").unlink()
        (whole / "images" / "00-cat" / "00-000077.png").write_bytes(b"extra")
        (whole / "soft_labels" / "000002.safetensors").write_bytes(b"changed")
        assert verify(whole) == [
            "manifest.jsonl line 39 is malformed: cut short",
            "manifest.jsonl line 38 is malformed: Expecting value: line 1 column 1 (char 0)",
            "manifest.jsonl: 2 lines for image 00-000000",
            "manifest.jsonl: unit 0 has 7 lines, expected 6",
            "card.json counts [12, 12, 12] images a class, manifest.jsonl has [13, 12, 12]",
            "images/00-cat/00-000000.png has changed: its sha256 is not the one in manifest.jsonl",
            "images/00-cat/00-000001.png cannot be read: No such file or directory",
            "soft_labels/000002.safetensors has changed: its sha256 is not the one in manifest.jsonl",
            "images/00-cat/00-000077.png is not in manifest.jsonl",
        ]

    def test_no_store(self, tmp_path):
        assert "is not a folder" in verify(tmp_path / "nowhere")[0]
        assert "holds no card.json; expected a dataset written by bnfuse" in verify(tmp_path)[0]

    @pytest.mark.parametrize(
        "card, message",
        [
            (b"{", "is not JSON"),
            (b"[]", "not the card of a bnfuse dataset"),
            (b'{"format": "bnfuse-store", "format_version": 2}', "format version 2, this bnfuse reads 1"),
            (b'{"format": "bnfuse-store", "format_version": 1}', "must have class_names"),
            (b'{"format": "bnfuse-store", "format_version": 1, "class_names": ["x"]}', "must have `complete`"),
        ],
    )
    def test_damaged_card(self, whole, card, message):
        (whole / "card.json").write_bytes(card)
        assert message in verify(whole)[0]
        for reading in (lambda: read_store(whole), lambda: write(whole)):
            with pytest.raises(InputError, match=message):
                reading()

    @pytest.mark.parametrize("content", [b"", b"x" * 100])
    def test_damaged_soft_labels(self, whole, content):
        (whole / "soft_labels" / "000002.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="000002.safetensors holds no soft labels"):
            read_store(whole).soft_labels()


def nursery(root: Path) -> dict:
    """Fork writers and kill them. A fresh process does this, since one in which torch has started threads should not
    fork, and since importing torch anew for each writer would take longer than all else. Nothing is flushed: what a
    killed process has written is in the system's memory, where all others find it."""
    os.fsync = lambda descriptor: None
    steps, differ = kill_at_every_step(root / "every", write_and_die)
    steps_of_ranks, ranks_differ = kill_at_every_step(root / "ranks", write_with_ranks_and_die)
    return {
        **kill_at_random_moments(root / "random"),
        **{"steps": steps, "differ": differ, "steps_of_ranks": steps_of_ranks, "ranks_differ": ranks_differ},
    }


def forked(work) -> int:
    """The process id of a child that does `work` and nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def kill_at_random_moments(root: Path) -> dict:
    units = 60
    started = time.monotonic()
    write(root / "reference", units)
    typical = time.monotonic() - started
    moments, target = random.Random(0), root / "killed"
    killed, progress = 0, []
    for _ in range(10):
        child = forked(lambda: (write(target, units, finish=False), time.sleep(600)))
        time.sleep(moments.uniform(0.01, 0.15) * typical)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        manifest = target / "manifest.jsonl"
        progress.append(manifest.read_bytes().count(b"\n") // 6 if manifest.exists() else 0)
    write(target, units)
    return {"killed": killed, "progress": progress, "same": tree(target) == tree(root / "reference")}


def kill_at_every_step(root: Path, work) -> tuple[int, list[int]]:
    """Kill a writer at its first system call that changes the disk, another at its second, and so on to the end; returns the
    number of steps, and those after which the finished store differed."""
    write(root / "reference", 3)
    expected, differ, step = tree(root / "reference"), [], 0
    while True:
        step += 1
        target = root / str(step)
        status = os.waitpid(forked(lambda target=target, step=step: work(target, step)), 0)[1]
        write(target, 3)
        if tree(target) != expected:
            differ.append(step)
        if os.waitstatus_to_exitcode(status) != 9:  # it got to the end
            return step - 1, differ


def write_and_die(root: Path, step: int) -> None:
    die_at(step)
    write(root, 1, finish=False)
    write(root, 3)


def write_with_ranks_and_die(root: Path, step: int) -> None:
    """Shards are folded in twice: when the store is opened again, and when it is finished."""
    die_at(step)
    write_with_ranks(root, 2, ranks=2, finish=False)
    write_with_ranks(root, 3, ranks=2)


def die_at(step: int) -> None:
    calls = 0

    def dying(call):
        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == step:
                if call is os.write:
                    call(arguments[0], arguments[1][: len(arguments[1]) * step % 997])
                os._exit(9)
            return call(*arguments, **options)

        return counted

    for name in ("open", "write", "fsync", "replace", "ftruncate", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))


if __name__ == "__main__":
    print(json.dumps(nursery(Path(sys.argv[1]))))


def test_images_become_a_store_in_their_order(tmp_path):
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0, 1, 1, 0, 2, 1])
    write_store(images, labels, ["a", "b", "c"], tmp_path / "store")
    found = load_dataset(str(tmp_path / "store")).in_memory()
    assert found.images.permute(0, 3, 1, 2).equal(images) and found.labels.equal(labels)
    assert read_store(tmp_path / "store").complete and verify(tmp_path / "store") == []
