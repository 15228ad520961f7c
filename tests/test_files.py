"""A file is written whole or not at all, by bytes or by a block that writes it itself."""

import errno
import os

import pytest

from bnfuse.files import atomic_path, is_temporary, sync, write_atomically


def test_it_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "deep" / "a.json"
    for content in (b"old", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), OSError("unnumbered")])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert is_temporary(temporary) and not is_temporary(path)
        raise failure
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, call):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError) as error:
            write_atomically(path, b"new")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path)) and not list(tmp_path.iterdir())


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.json"), atomic_path(tmp_path / "a.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_sync_takes_files_and_folders(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    sync(tmp_path / "a")
    sync(tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a" / "b.json", b"new")
