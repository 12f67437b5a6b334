"""One run at a time in an output folder."""

import json
import logging
import os
import socket
from pathlib import Path


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)

_NAME = ".lock"
# The system gives up a process's lock as soon as it closes any handle of the file: one handle for each, kept.
_held: dict[Path, object] = {}


class FolderInUseError(RuntimeError):
    """Another process writes to the folder."""


def lock_folder(folder: str | Path) -> None:
    """Makes this process the only one that may lock `folder`, until `unlock_folder` or its end, however it ends.

    Again in one process it changes nothing. The file `.lock` in the folder holds the process's id and host.

    Raises:
        FolderInUseError: another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / _NAME).resolve()
    if path in _held:
        return
    file = open(path, "a+")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise FolderInUseError(
            f"another run writes here: {folder} is locked by {_described(owner)}. Wait for its end, end it, or choose "
            "another output_dir."
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): see to it that one run alone writes there.", folder, error)
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}) + "\n")
    file.flush()
    _held[path] = file


def unlock_folder(folder: str | Path) -> None:
    """Lets another process lock the folder."""
    file = _held.pop((Path(folder) / _NAME).resolve(), None)
    if file is not None:
        file.close()


def _described(owner: str) -> str:
    try:
        found = json.loads(owner)
        return f"process {found['process']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which"


__all__ = ["FolderInUseError", "lock_folder", "unlock_folder"]
