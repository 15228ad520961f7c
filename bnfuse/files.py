"""One file on disk, whole or not at all: written beside its place, flushed, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

_LOCKS_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def write_atomically(path: str | os.PathLike, content: bytes, *, sync_folder: bool = True) -> None:
    """Write `content` to `path`, see `atomic_path`."""
    with atomic_path(path, sync_folder=sync_folder) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: str | os.PathLike, *, sync_folder: bool = True) -> Iterator[Path]:
    """The path of a temporary file, which takes the place of `path` once the block has written it.

    At every moment `path` is what it was or is whole, even if the machine stops. If anything fails, it is what it was
    and the temporary file is gone; only a killed process leaves one, see `is_temporary`.

    Parameters
    ----------
    path : the file; its folder is made if need be
    sync_folder : False leaves it to the caller to `sync` the folder, once for many files, before he relies on them

    Raises
    ------
    OSError
        The disk refuses. It names `path` or its folder, never the temporary file.
    """
    path = Path(path)
    # The process is part of the name, so that two that write the same file do not write into each other's.
    temporary = path.with_name(f".{os.getpid()}-{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # it is not there, or may not be taken away: what went wrong before is what matters
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if sync_folder:
        sync(path.parent)


def check_place(path: str | os.PathLike) -> None:
    """InputError where no file can be written to `path`: asked before the work that leads to it. Makes its folder."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, taken: str | None) -> bool:
    """Locks an open file against other processes until it is closed, or this process ends; False where there are no locks.

    Where another process has it, InputError with the message `taken`, or without one waits for it. OSError where locking fails.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if taken is None else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise InputError(taken) from error
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
        return False
    return True


@contextmanager
def locked_folder(folder: Path, taken: str) -> Iterator[None]:
    """Holds `folder` against other processes for the block; it is free again when the process ends, however it ends.

    InputError with the message `taken` where another holds it. A file system without locks is not locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, taken)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def turns_at(path: Path) -> Iterator[None]:
    """Of all processes and threads that read and then write `path`, one at a time is in the block; the others wait.

    Leaves an empty file ``.NAME.lock`` beside it. A file system without locks lets all in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, None)
        yield
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a file is called like what a process killed in `atomic_path` leaves."""
    return re.fullmatch(r"\..+\.(png|safetensors|jsonl?)\.tmp", path.name) is not None
