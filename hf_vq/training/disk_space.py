"""What is said when something cannot be written: the path, the bytes that are needed, and those that are free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class WriteError(OSError):
    """Something could not be written. `filename` is its path.

    Attributes:
        reason (`str`): the system's own words.
        needed (`int`): about how many bytes it takes.
    """

    reason: str
    needed: int


def write_failure(path: Path, what: str, reason: str, needed: int, rest: str = "") -> WriteError:
    """The error of `what`, which takes about `needed` bytes and could not be written to `path`.

    Args:
        rest: what else is to be said, after a semicolon.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    number = errno.ENOSPC if free < needed else errno.EIO
    text = f"{what} could not be written ({reason}): it takes about {needed} bytes, and {free} bytes are free"
    error = WriteError(number, f"{text}; {rest}" if rest else text, str(path))
    error.reason, error.needed = reason, needed
    return error


@contextmanager
def write_failures_named(path: Path, what: str, needed: int, rest: str = "") -> Iterator[None]:
    """Inside it a failure to write becomes the error of `write_failure`; a draft is the caller's to remove."""
    try:
        yield
    except WriteError as error:  # of a file below `path`
        raise write_failure(Path(error.filename), what, error.reason, error.needed, rest) from error
    except (OSError, SafetensorError) as error:
        raise write_failure(path, what, f"{type(error).__name__}: {error}", needed, rest) from error


def check_space(path: Path, what: str, needed: int) -> None:
    """Refuses to begin what does not fit beside `path`.

    Raises:
        OSError: with errno `ENOSPC`.
    """
    if needed > shutil.disk_usage(path.parent).free:
        raise write_failure(path, what, "the disk is too full", needed)


__all__ = ["WriteError", "check_space", "write_failure", "write_failures_named"]
