"""The rows of a data set from wherever it lies: the Hub, folders, files, patterns, addresses, saved data sets."""

import glob
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .image_decoding import PathRules


if TYPE_CHECKING:
    import datasets

    from .image_datasets import DataArguments

# a file's ending, and the module of `datasets` that reads it
_KINDS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
_IMAGES = (".zip", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HOLD_OUT = (
    " Hold a share of it out to validate on, by --validation_share 0.05 in training; `hf-vq evaluate` takes "
    "--validation-share 0.05 for those, or --split train for all."
)
# names in a path, as `datasets` finds them in a folder
_SPLITS = {"validation": r"validation|valid|val|dev", "test": r"testing|test|evaluation|eval"}


class MissingSplitError(ValueError):
    """A data set has no split of a name."""


def open_rows(arguments: "DataArguments", split: str) -> "datasets.Dataset | datasets.IterableDataset":
    """The rows of one split as `datasets` gives them, with every column.

    Raises:
        MissingSplitError: there is no such split.
        ValueError: there is no such data set.
    """
    import datasets

    # else `datasets` counts the loading of every data set, of a local folder too, at an address of its own
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    source, streaming = arguments.dataset_name_or_path, arguments.streaming
    folder = Path(source).expanduser()
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return _open_saved(folder, split, streaming)
        if streaming and re.search(r"[\[+]", split):
            raise ValueError(
                f"the split {split!r} must be a whole one with streaming=True, which cannot cut or join splits: read "
                "without it, or give training and validation files of their own; `max_samples` takes the first rows."
            )
        if folder.is_dir():
            return _open_folder(folder, split, arguments)
        files = _files(source)
        if files:
            return _load(_kind_of(files), split, arguments, data_files=_by_split(files))
        if is_from_hub(source):
            return datasets.load_dataset(source, arguments.dataset_config_name, split=split, streaming=streaming)
    except (KeyError, ValueError) as error:
        reason = str(error)
        if re.search("(unknown|bad) split", reason.lower()):
            found = re.findall(r"'([^']+)'", reason.rpartition("[")[2])  # the names that `datasets` lists
            is_possible = len(found) == 1 and not streaming and arguments.validation_share is None
            hint = HOLD_OUT if is_possible else ""
            raise MissingSplitError(
                f"dataset_name_or_path={source!r} has no split {split!r}; it has {found}.{hint}"
            ) from error
        if re.search("instruction format|slice boundaries|split name", reason.lower()):
            raise ValueError(
                f"the split must be a name, or a part of one such as 'train[5%:]' or 'train[:100]', got {split!r}."
            ) from error
        raise
    raise ValueError(
        f"dataset_name_or_path={source!r} is neither a folder, a file, a pattern, an address with files, nor a Hub id."
    )


def is_from_hub(source: str) -> bool:
    """Whether a source that is no folder and no file is a Hub id, `name` or `user/name`."""
    is_local = Path(source).expanduser().exists() or source.startswith((".", "/", "~"))
    return not is_local and "://" not in source and not glob.has_magic(source) and source.count("/") <= 1


def path_rules(source: str) -> PathRules:
    """What the rows of a source may name: of the Hub's and of an address's, itself and what was downloaded alone."""
    if is_from_hub(source) or "://" in source:
        import datasets
        from huggingface_hub import constants

        caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
        folders = tuple(str(Path(folder).resolve()) for folder in caches)
        own = source.split("://")[0] if "://" in source else "hf"
        return PathRules((own,) if own == "hf" else (own, "https", "hf"), folders=folders)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = folder.parent
    return PathRules(root=None if glob.has_magic(str(folder)) else str(folder.resolve()))


def _load(kind: str, split: str, arguments: "DataArguments", **source):
    import datasets

    load = {"split": split, "streaming": arguments.streaming, **source}
    if kind != "imagefolder":
        return datasets.load_dataset(kind, **load)
    if not _has_archives(source):
        return datasets.load_dataset(kind, **load)
    # `datasets` takes the classes of an archive from the archive's own folder: they are taken from the paths inside
    rows = datasets.load_dataset(kind, drop_labels=True, **load)
    if arguments.label_column != "label" or "label" in rows.features:
        return rows
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows.map(_label_of_path, features=datasets.Features({**rows.features, "label": datasets.Value("string")}))


def _has_archives(source: dict) -> bool:
    if "data_dir" in source:
        return any(Path(source["data_dir"]).rglob("*.zip"))
    return any(file.endswith(".zip") for files in source["data_files"].values() for file in files)


def _label_of_path(row: dict) -> dict:
    return {"label": row["image"]["path"].split("::")[0].split("/")[-2]}


def _open_folder(folder: Path, split: str, arguments: "DataArguments"):
    for pattern, kind in (("*.parquet", "parquet"), ("*.tar", "webdataset")):
        if any(path.stem != "metadata" for path in folder.rglob(pattern)):
            return _load(kind, split, arguments, data_dir=str(folder))
    tables = [str(path) for pattern in ("*.jsonl", "*.csv") for path in sorted(folder.glob(pattern))]
    if tables and not any(folder.rglob("metadata.*")):
        return _load(_kind_of(tables), split, arguments, data_files=_by_split(tables))
    return _load("imagefolder", split, arguments, data_dir=str(folder))


def _files(source: str) -> list[str]:
    """The files that a path, a pattern or an address stands for."""
    if "://" in source:
        return _remote_files(source)
    path = str(Path(source).expanduser())
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    return [file for file in found if Path(file).is_file()]


def _remote_files(source: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise ValueError(f"dataset_name_or_path={source!r}: {error}") from error
    if not glob.has_magic(path) and Path(path).suffix in (*_KINDS, *_IMAGES):
        return [source]
    found = system.glob(path) if glob.has_magic(path) else system.find(path)
    return sorted(system.unstrip_protocol(file) for file in found if Path(file).suffix.lower() in (*_KINDS, *_IMAGES))


def _kind_of(files: list[str]) -> str:
    tables = {_KINDS.get(Path(file).suffix.lower(), "imagefolder") for file in files}
    if len(tables) > 1 and "imagefolder" in tables:  # with a table of metadata beside the images
        return "imagefolder"
    if len(tables) > 1:
        raise ValueError(f"dataset_name_or_path: files of one kind are needed, got {sorted(tables)}.")
    return tables.pop()


def _by_split(files: list[str]) -> dict[str, list[str]]:
    """Files by the split that their names, or their folder's, speak of; else, or if there is one file, `train`."""
    splits: dict[str, list[str]] = {}
    shared = len(os.path.commonpath(files)) if len(files) > 1 else len(files[0])
    for file in files:
        words = re.split(r"[\W_]+", file[shared:].lower())
        found = (split for split, names in _SPLITS.items() if any(re.fullmatch(names, word) for word in words))
        splits.setdefault(next(found, "train"), []).append(file)
    return splits


def _open_saved(folder: Path, split: str, streaming: bool):
    import datasets

    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split in splits:
        rows = splits[split]
    else:  # "train[:5%]", or a name that is not there, which to_absolute refuses
        lengths = {name: len(rows) for name, rows in splits.items()}
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        rows = datasets.concatenate_datasets(
            [splits[part.splitname].select(range(part.from_, part.to)) for part in slices]
        )
    return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows
