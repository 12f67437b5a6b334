"""The files below a folder, also those that links lead to."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: str | Path) -> list[Path]:
    """The files in a folder and its folders, in order; links are followed, those that lead back up are left out.

    `Path.rglob` does not enter linked folders, so that a folder whose parts are linked would lose them in silence.
    """
    return sorted(_files(Path(folder), frozenset()))


def _files(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    place = folder.resolve()
    if place in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(folder / entry.name, above | {place})
            elif entry.is_file():
                yield folder / entry.name


__all__ = ["files_below"]
