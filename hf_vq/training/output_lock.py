"""One run at a time in an output folder."""

import errno
import json
import logging
import os
import socket
from pathlib import Path
from typing import BinaryIO

from .disk_space import write_failures_named


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)

_NAME, _BYTES = ".lock", 100
# a network's file system that has no locks, or whose lock service does not run
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# The system gives up a process's lock as soon as it closes any handle of the file: one handle for each, kept.
_held: dict[Path, BinaryIO] = {}


class FolderInUseError(RuntimeError):
    """Another process writes to the folder."""


def lock_folder(folder: str | Path) -> None:
    """Makes this process the only one that may lock `folder`, until `unlock_folder` or its end, however it ends.

    Again in one process it changes nothing. The file `.lock` in the folder holds the process's id and host; it is
    emptied by `unlock_folder`, so that one that names another host, on a file system whose locks do not reach there,
    is of a run that may still write.

    Raises:
        FolderInUseError: another process has it.
        OSError: the folder cannot be made or written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "`output_dir` must be a folder, got a file", str(folder))
    path = (folder / _NAME).resolve()
    if path in _held:
        return
    what = f"the lock of the folder {folder}"
    with write_failures_named(path, what, _BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # else what a full disk has refused is written again by `close`
    _take(file, folder)
    host = socket.gethostname()
    before = _owner(file)
    if before.get("host", host) != host:
        logger.warning(
            "%s was last locked by process %s on %s, which has not released it: see to it that it has ended.",
            folder,
            before.get("process"),
            before["host"],
        )
    try:
        with write_failures_named(path, what, _BYTES):
            file.truncate(0)
            file.write(json.dumps({"process": os.getpid(), "host": host}).encode() + b"\n")
    except OSError:
        file.close()
        raise
    _held[path] = file


def _take(file: BinaryIO, folder: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = _owner(file)
        file.close()
        described = f"process {owner['process']} on {owner['host']}" if owner else "a process that has not said which"
        raise FolderInUseError(
            f"another run writes here: {folder} is locked by {described}. Wait for its end, end it, or choose another "
            "output_dir."
        ) from error
    except OSError as error:
        if not lacks_locks(error):
            file.close()
            raise
        logger.warning("%s cannot be locked (%s): see to it that one run alone writes there.", folder, error)


def lacks_locks(error: OSError) -> bool:
    """Whether a lock was refused because the file system has none."""
    return error.errno in _NO_LOCKS


def unlock_folder(folder: str | Path) -> None:
    """Lets another process lock the folder."""
    file = _held.pop((Path(folder) / _NAME).resolve(), None)
    if file is not None:
        file.truncate(0)
        file.close()


def _owner(file: BinaryIO) -> dict:
    """The `process` and `host` that the lock says; empty if it does not."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return {name: found[name] for name in ("process", "host")}
    except (ValueError, KeyError, TypeError):
        return {}


__all__ = ["FolderInUseError", "lacks_locks", "lock_folder", "unlock_folder"]
