"""Writing in the background is writing: in order, one unit at a time, with no error and no unit lost."""

import os
import threading

import pytest
import torch

from bnfuse import InputError
from bnfuse.store import ImageRecord, Store, read_store, verify
from bnfuse.writing import BackgroundWriter


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def unit(number: int):
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8, generator=generator)
    return pixels, [ImageRecord(k, number, number, {}) for k in range(2)], torch.randn(2, 2, generator=generator)


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "made", card={}, class_names=["a", "b"]) as store:
        yield store


def test_it_leaves_what_committing_leaves(store, tmp_path):
    with Store.open(tmp_path / "foreground", card={}, class_names=["a", "b"]) as plain:
        for number in (2, 0, 1, 3):
            plain.commit(number, *unit(number))
        plain.finish()
    with BackgroundWriter(store) as writer:
        for number in (2, 0, 1, 3):
            writer.commit(number, *unit(number))
        writer.drain()
        assert store.done == {0, 1, 2, 3}
    store.finish()
    assert tree(store.root) == tree(tmp_path / "foreground") and verify(store.root) == []


def test_one_unit_is_in_flight_and_the_next_waits(store, monkeypatch):
    may_end, began, commit = threading.Event(), [], store.commit

    def slow(number, *rest):
        began.append(number)
        assert threading.current_thread() is not threading.main_thread()
        assert may_end.wait(10)
        commit(number, *rest)

    monkeypatch.setattr(store, "commit", slow)
    with BackgroundWriter(store) as writer:
        writer.commit(0, *unit(0))  # returns though nothing is written yet
        assert not store.done
        threading.Timer(0.2, may_end.set).start()
        writer.commit(1, *unit(1))  # waited for unit 0
        assert 0 in store.done and may_end.is_set()
    assert began == [0, 1] and store.done == {0, 1}


@pytest.mark.parametrize("told_by", ["commit", "drain", "the end of the block"])
def test_the_disks_error_is_told_in_the_main_thread(store, told_by, monkeypatch):
    import bnfuse.store as module

    def full(path, *rest, **options):
        raise OSError(28, "No space left on device", str(path))

    def run():
        with BackgroundWriter(store) as writer:
            writer.commit(0, *unit(0))
            writer.drain()
            monkeypatch.setattr(module, "write_atomically", full)
            writer.commit(1, *unit(1))
            if told_by == "commit":
                with pytest.raises(InputError, match="No space left on device.*2 images committed so far are safe"):
                    writer.commit(2, *unit(2))
                writer.drain()  # told once
            elif told_by == "drain":
                with pytest.raises(InputError, match="No space left"):
                    writer.drain()

    if told_by == "the end of the block":
        with pytest.raises(InputError, match="No space left"):
            run()
    else:
        run()
    monkeypatch.undo()
    assert store.done == {0} and {entry.unit for entry in read_store(store.root).entries} == {0}
    store.commit(1, *unit(1))  # the store is as it was before


@pytest.mark.parametrize("refuses", [False, True])
def test_a_failing_block_still_commits_what_was_given(store, refuses, recwarn):
    pixels, records, logits = unit(0)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(store) as writer:
        writer.commit(0, pixels.float() if refuses else pixels, records, logits)
        raise KeyboardInterrupt
    assert store.done == (set() if refuses else {0})
    assert [str(w.message) for w in recwarn if "was not committed: images must be uint8" in str(w.message)] or not refuses
    assert not any(thread.name.startswith("bnfuse-writer") for thread in threading.enumerate())
