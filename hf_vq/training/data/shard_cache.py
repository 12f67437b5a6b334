"""A folder with what a tokenizer makes of a whole data set, in shards that all processes write together.

Images are read and rows are written shard by shard, so that memory does not grow with the data set. A shard appears
complete or not at all; a second call goes on with those that are missing, on any number of processes, and replaces
those that are damaged. `config.json` says which tokenizer and which images the shards belong to: others are refused.

Of a map-style data set every process takes every N-th shard. A stream is cut into groups of its own shards, which do
not depend on the number of processes: with at least as many groups as processes, each process reads its own groups
alone, so that together they read the data once; with fewer, each reads the whole stream and decodes its part.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ...distributed import from_main_process, is_distributed, is_main_process, num_processes
from ...evaluation.evaluate import evaluation_mode
from ..checkpointing import draft_path, flush_file, preserved_random_state, remove_unfinished, write_file_atomically
from ..disk_space import check_space, write_failures_named
from .cache_identity import StaleIndicesError, cache_lock, images_fingerprint, read_sample
from .streaming import StreamingImageDataset


if TYPE_CHECKING:
    import pyarrow as pa


logger = logging.getLogger(__name__)

_STREAM_GROUPS = 128  # at most
# A shard is what one process writes, and what is lost when the process ends before its time: at most so much, and
# of a map-style data set so little that the shards can be shared out.
_SHARD_BYTES, _SHARD_ROWS = 2**26, 4096
_SHARDS, _FEWEST_ROWS = 64, 256


@dataclass(frozen=True)
class ShardFormat:
    """How the shards of a kind of cache are stored.

    Args:
        name: of the kind; a shard is `name-<number>.extension`, of a stream `name-<group>-<number>.extension`.
        extension: of the files.
        write: writes a table to a file.
        read, read_schema: opens a file, in memory or mapped; its schema alone.
        is_compressed: whether a shard takes less than the table.
    """

    name: str
    extension: str
    write: Callable[["pa.Table", Path], None]
    read: Callable[[Path], "pa.Table"]
    read_schema: Callable[[Path], "pa.Schema"]
    is_compressed: bool

    def path(self, folder: Path, key: tuple[int, ...]) -> Path:
        numbers = "-".join(f"{number:05d}" for number in key)
        return folder / f"{self.name}-{numbers}.{self.extension}"

    def shards(self, folder: Path) -> dict[tuple[int, ...], Path]:
        """The shards of a folder, in the order of the rows; one without any row has the extension `empty`."""
        files = sorted(file for end in (self.extension, "empty") for file in folder.glob(f"{self.name}-*.{end}"))
        return {tuple(map(int, file.stem.removeprefix(f"{self.name}-").split("-"))): file for file in files}


@dataclass(frozen=True)
class CacheRequest:
    """What is to be written.

    Args:
        kind: the format.
        encoder: called with a list of samples; gives columns of `(len(samples), ...)` by name.
        dataset: map-style, or a `StreamingImageDataset`.
        identity: what the cache belongs to; JSON.
        facts: what else `config.json` says; JSON.
        batch_size, num_workers, progress: see `write_indices`.
        rows_per_shard: None: 4096, or fewer, for a shard of 64 MiB at most, and for 64 shards of a map-style data set
            where they have 256 rows each.
    """

    kind: ShardFormat
    encoder: nn.Module
    dataset: Dataset
    identity: dict
    facts: dict
    batch_size: int
    rows_per_shard: int | None
    num_workers: int
    progress: bool


def write_cache(request: CacheRequest, path: Path, overwrite: bool) -> None:
    """Writes the shards that are missing; called by every process.

    Raises:
        StaleIndicesError: the folder holds something else, and `overwrite` is not set.
        OSError: the disk is full; the shards that are there are whole.
    """
    with cache_lock(path, is_writer=is_main_process()), evaluation_mode(request.encoder), preserved_random_state():
        # a run that finds its cache goes on with the same random numbers as one that has to write it
        opened = {}  # of a stream, by the main process: its first groups, see `_survey`
        first, images, known = from_main_process(
            (*_survey(request.dataset, opened), read_info(path)) if is_main_process() else None
        )
        identity = {**request.identity, "images": images}
        if request.rows_per_shard is not None:
            identity["rows_per_shard"] = request.rows_per_shard
        stale = [] if known is None else [name for name, value in identity.items() if known.get(name) != value]
        if stale and not overwrite:
            raise StaleIndicesError(
                f"the {request.kind.name} in {path} differ in {', '.join(stale)} from what is asked for: remove "
                "them, give another folder, or set overwrite=True to replace them."
            )
        if known is not None and not stale:
            identity.setdefault("rows_per_shard", known["rows_per_shard"])
        finished = None
        if is_main_process() and "rows_per_shard" in identity:
            finished = _sound_shards(request.kind, path, identity)
            if known is not None and not stale and known["complete"] and _has_all(request.kind, path, known, finished):
                finished = "all"
        finished = from_main_process(finished)
        if finished != "all":
            writer = _ShardWriter(request, path, identity, first, opened)
            writer.write_missing(finished or {})
            barrier()
            if is_main_process():
                write_file_atomically(path / "config.json", json.dumps(writer.summary(), indent=1))
        barrier()


def read_info(path: Path) -> dict | None:
    """What `config.json` says; None where there is none, or one that cannot be read, which is named."""
    file = path / "config.json"
    try:
        info = json.loads(file.read_text())
        if not isinstance(info, dict) or "complete" not in info:
            raise ValueError("it must hold an object with the field `complete`")
        return info
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s cannot be read: %s.", file, error)
        return None


def whole_shards(kind: ShardFormat, path: Path, writer: str) -> tuple[dict, list[Path]]:
    """What `config.json` says of a complete cache, and its shards.

    Raises:
        ValueError: there is no cache, not all of it, or a damaged shard; `writer` is the function that mends it.
    """
    info = read_info(path)
    if info is None:
        raise ValueError(f"{path} holds no cached {kind.name}: write them with {writer}.")
    if not info["complete"]:
        raise ValueError(f"the {kind.name} in {path} are not complete: call {writer} again, it goes on where it was.")
    missing = [name for name in info["shards"] if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: call {writer} again, it writes what is missing.")
    files = [path / name for name in info["shards"] if not name.endswith(".empty")]
    for file in files:
        damage = find_shard_damage(kind, file)
        if damage is not None:
            raise ValueError(f"{file} is damaged ({damage}): call {writer} again, which replaces it.")
    return info, files


def find_shard_damage(kind: ShardFormat, file: Path, identity: dict | None = None) -> str | None:
    """Why a shard cannot be used: it cannot be read, does not have its checksum, or has another identity."""
    import pyarrow as pa

    try:
        own = _own_metadata(kind, file)
        if file.suffix != ".empty" and _checksum(kind.read(file)) != own.get("checksum"):
            return "it does not have the checksum that it was written with"
    except (OSError, ValueError, pa.ArrowException) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None if identity is None or own.get("identity") == identity else f"it holds other {kind.name}"


def barrier() -> None:
    """Waits for all processes, where there are several."""
    if is_distributed():
        dist.barrier()


def _survey(dataset: Dataset, opened: dict[int, Iterator[dict]]) -> tuple[dict, str]:
    """The first sample that can be read, and the fingerprint of the images, from one pass over the first of them.

    The groups of a stream that are read for it, whole or in part, are put into `opened`, with all their rows.
    """
    if isinstance(dataset, StreamingImageDataset):
        head = []
        for group in range(_num_groups(dataset)):
            rows, seen = iter(_group_of(dataset, group)), []
            opened[group] = itertools.chain(seen, rows)
            for row, example in enumerate(rows):
                seen.append(example)
                sample = dataset.read(example, _name_of(row, group))
                head += [] if sample is None else [sample]
                if len(head) == 16:
                    return head[0], images_fingerprint(dataset, head=head)
        if not head:
            raise ValueError("the data set has no image that can be read.")
        return head[0], images_fingerprint(dataset, head=head)
    for row in range(len(dataset)):
        sample = read_sample(dataset, row)
        if sample is not None:
            return sample, images_fingerprint(dataset)
    raise ValueError("the data set has no image that can be read.")


def _num_groups(dataset: Dataset) -> int:
    """Into how many groups a stream is cut; a map-style data set into one."""
    return min(dataset.rows.num_shards, _STREAM_GROUPS) if isinstance(dataset, StreamingImageDataset) else 1


def _group_of(dataset: StreamingImageDataset, group: int) -> Iterable[dict]:
    return dataset.rows.shard(num_shards=_num_groups(dataset), index=group)


def _name_of(row: int, group: int) -> str:
    return f"row {row} of part {group}"


def _own_metadata(kind: ShardFormat, file: Path) -> dict:
    """What a shard says of itself."""
    if file.suffix == ".empty":
        return json.loads(file.read_text())
    return json.loads((kind.read_schema(file).metadata or {}).get(b"shard", b"{}"))


def _checksum(table: "pa.Table") -> str:
    """Of the values, whatever the format that they are stored in."""
    import pyarrow as pa

    digest = hashlib.sha256(str(table.num_rows).encode())
    for name in table.column_names:
        digest.update(name.encode())
        for chunk in table.column(name).chunks:
            if pa.types.is_fixed_size_list(chunk.type):
                digest.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).view(np.uint8))
    others = [name for name in table.column_names if not pa.types.is_fixed_size_list(table.schema.field(name).type)]
    for batch in table.select(others).to_batches(max_chunksize=1024):
        digest.update(json.dumps(batch.to_pylist(), default=repr).encode())
    return digest.hexdigest()


def _sound_shards(kind: ShardFormat, path: Path, identity: dict) -> dict[tuple[int, ...], dict]:
    """What each shard says of itself; one that is damaged or belongs to something else is named and removed."""
    found = {}
    for key, file in kind.shards(path).items():
        damage = find_shard_damage(kind, file, identity)
        if damage is None:
            found[key] = _own_metadata(kind, file)
        else:
            logger.warning("Writing %s again: %s.", file, damage)
            file.unlink()
    return found


def _has_all(kind: ShardFormat, path: Path, known: dict, finished: dict) -> bool:
    there = {kind.path(path, key).stem for key in finished}
    missing = [name for name in known["shards"] if Path(name).stem not in there]
    for name in missing:
        logger.warning("Writing %s again: it is missing.", path / name)
    return not missing


@dataclass
class _Plan:
    """The shards of one process, by key: `(number,)`, of a stream `(group, number)`."""

    finished: dict[tuple[int, ...], dict]
    groups: int
    rank: int = field(default_factory=lambda: dist.get_rank() if is_distributed() else 0)
    world: int = field(default_factory=num_processes)

    def is_mine(self, key: tuple[int, ...]) -> bool:
        place = key[0] if len(key) == 1 or self.groups >= self.world else sum(key)
        return place % self.world == self.rank and key not in self.finished

    def must_be_read(self, group: int) -> bool:
        """Whether this process has to read a group of the stream."""
        if self.groups >= self.world and group % self.world != self.rank:
            return False
        return not _is_whole([own for key, own in self.finished.items() if key[0] == group])


def _is_whole(parts: list[dict]) -> bool:
    """Whether these are all shards of one group of a stream, in order."""
    return bool(parts) and parts[-1]["is_last"] and [part["number"] for part in parts] == list(range(len(parts)))


class _ShardWriter:
    """Encodes images and writes shards. Every process makes one.

    Args:
        identity: what the cache belongs to; with its `rows_per_shard`, if that is known.
        first: a sample.
        opened: the rows of the groups of a stream that have been opened already.
    """

    def __init__(
        self, request: CacheRequest, path: Path, identity: dict, first: dict, opened: dict[int, Iterator[dict]]
    ):
        self.opened = opened
        self.request, self.path, self.kind, self.dataset = request, path, request.kind, request.dataset
        self.is_stream = isinstance(self.dataset, StreamingImageDataset)
        self.groups = _num_groups(self.dataset)
        encoded = request.encoder([first])
        self.grids = {name: list(values.shape[1:]) for name, values in encoded.items()}
        self.dtypes = {name: values.dtype for name, values in encoded.items()}
        self.bytes_per_row = sum(values.nbytes for values in encoded.values())
        most = max(1, min(_SHARD_ROWS, _SHARD_BYTES // self.bytes_per_row))
        if not self.is_stream:
            most = min(most, max(_FEWEST_ROWS, -(-len(self.dataset) // _SHARDS)))
        self.identity = {"rows_per_shard": most, **identity}
        self.rows_per_shard = self.identity["rows_per_shard"]
        self.features = self._features(first)

    def _features(self, sample: dict):
        import datasets

        features = {
            name: datasets.List(datasets.Value(self.dtypes[name].name), length=int(np.prod(grid)))
            for name, grid in self.grids.items()
        }
        known = getattr(getattr(self.dataset, "rows", None), "features", None) or {}
        for name, value in sample.items():
            if name in known:
                features[name] = known[name]
            elif name not in ("pixel_values", "condition") and name not in self.grids:
                features[name] = _plain_feature(name, value)
        return datasets.Features(features)

    def write_missing(self, finished: dict[tuple[int, ...], dict]) -> None:
        """Writes this process's part of the shards that are not among the finished ones."""
        from tqdm.auto import tqdm

        plan = _Plan(finished, self.groups)
        if is_main_process():
            self._begin(finished)
        barrier()
        batches = self._stream_batches(plan) if self.is_stream else self._map_batches(plan)
        total = None if self.is_stream else sum(len(rows) for key, rows in self._map_shards() if plan.is_mine(key))
        show = self.request.progress and plan.rank == 0
        with tqdm(total=total, unit="image", desc=self.kind.name, disable=not show, mininterval=1.0) as bar:
            for key, group in itertools.groupby(batches, key=lambda batch: batch.key):
                self._write_shard(key, group, bar)

    def _begin(self, finished: dict[tuple[int, ...], dict]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        for key, file in self.kind.shards(self.path).items():
            if key not in finished:  # of something else, which is replaced
                file.unlink()
        if not self.is_stream and not self.kind.is_compressed:
            rows = len(self.dataset) - sum(own["rows"] + len(own["broken"]) for own in finished.values())
            check_space(self.path / "config.json", f"the {self.kind.name}", rows * self.bytes_per_row)
        write_file_atomically(self.path / "config.json", json.dumps({**self.identity, "complete": False}, indent=1))

    def _map_shards(self) -> Iterator[tuple[tuple[int], range]]:
        for number, first in enumerate(range(0, len(self.dataset), self.rows_per_shard)):
            yield (number,), range(first, min(first + self.rows_per_shard, len(self.dataset)))

    def _map_batches(self, plan: _Plan) -> Iterator["_Batch"]:
        size, batches = self.request.batch_size, []
        for key, rows in self._map_shards():
            if plan.is_mine(key):
                batches += [(key, rows[start : start + size]) for start in range(0, len(rows), size)]
        loader = DataLoader(
            _Rows(self.dataset),
            batch_sampler=[rows for _, rows in batches],
            num_workers=self.request.num_workers,
            collate_fn=list,
        )
        for (key, rows), samples in zip(batches, loader, strict=True):
            yield _Batch(key, list(zip(rows, samples, strict=True)), is_last=False)

    def _stream_batches(self, plan: _Plan) -> Iterator["_Batch"]:
        for group in range(self.groups):
            if not plan.must_be_read(group):
                continue
            stream = self.opened.pop(group) if group in self.opened else _group_of(self.dataset, group)
            key, batch = (group, 0), []
            for row, example in enumerate(stream):
                if batch and (row % self.rows_per_shard == 0 or len(batch) == self.request.batch_size):
                    yield _Batch(key, batch, is_last=False)
                    batch = []
                key = (group, row // self.rows_per_shard)
                if plan.is_mine(key):
                    batch.append((row, self.dataset.read(example, _name_of(row, group))))
            if plan.is_mine(key):
                yield _Batch(key, batch, is_last=True)

    def _write_shard(self, key: tuple[int, ...], batches: Iterator["_Batch"], bar) -> None:
        columns: dict[str, list] = {name: [] for name in self.features}
        broken, is_last = [], False
        for batch in batches:
            broken += [row for row, sample in batch.samples if sample is None]
            samples = [sample for _, sample in batch.samples if sample is not None]
            if samples:
                for name, values in self.request.encoder(samples).items():
                    columns[name].append(values.reshape(len(samples), -1))
                for name in columns.keys() - self.grids.keys():
                    columns[name] += [sample[name] for sample in samples]
            is_last = batch.is_last
            bar.update(len(batch.samples))
        table = self._table(columns)
        own = {"identity": self.identity, "number": key[-1], "rows": table.num_rows, "broken": broken}
        own |= {"is_last": is_last, "checksum": _checksum(table)}
        file = self.kind.path(self.path, key)
        if not table.num_rows:  # which not every reader takes
            write_file_atomically(file.with_suffix(".empty"), json.dumps(own))
            return
        table = table.replace_schema_metadata({**table.schema.metadata, b"shard": json.dumps(own).encode()})
        draft = draft_path(file)
        try:
            with write_failures_named(file, "a shard", table.nbytes, "the shards that are there are kept"):
                self.kind.write(table, draft)
                flush_file(draft)
                draft.rename(file)
                flush_file(self.path)
        finally:
            draft.unlink(missing_ok=True)

    def _table(self, columns: dict[str, list]) -> "pa.Table":
        import pyarrow as pa

        schema = self.features.arrow_schema
        arrays = []
        for name in self.features:
            if name in self.grids:
                length = int(np.prod(self.grids[name]))
                flat = np.concatenate(columns[name]).reshape(-1) if columns[name] else np.empty(0, self.dtypes[name])
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), length))
            else:
                arrays.append(pa.array(columns[name], type=schema.field(name).type))
        return pa.Table.from_arrays(arrays, schema=schema)

    def summary(self) -> dict:
        """What `config.json` says of a complete cache."""
        shards = self.kind.shards(self.path)
        own = {key: _own_metadata(self.kind, file) for key, file in shards.items()}
        if self.is_stream:
            parts = [[entry for key, entry in own.items() if key[0] == group] for group in range(self.groups)]
            is_whole = all(_is_whole(part) for part in parts)
        else:
            seen = sum(entry["rows"] + len(entry["broken"]) for entry in own.values())
            is_whole = seen == len(self.dataset) and list(own) == [(number,) for number in range(len(own))]
        if not is_whole:
            raise RuntimeError(f"{self.path} lacks shards: a process has not written its part.")
        return {
            **self.identity,
            "complete": True,
            "rows": sum(entry["rows"] for entry in own.values()),
            "shards": [file.name for file in shards.values()],
            # each a row of the data set; of a stream, its group and its row there
            "broken_rows": [
                [key[0], row] if self.is_stream else row for key, entry in own.items() for row in entry["broken"]
            ],
            "grids": self.grids,
            **self.request.facts,
        }


def _plain_feature(name: str, value: object):
    """Of an int, a text or texts, as samples without a `datasets` description have them."""
    import datasets

    if isinstance(value, (int, np.integer)):
        return datasets.Value("int64")
    if isinstance(value, str):
        return datasets.Value("string")
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return datasets.List(datasets.Value("string"))
    raise ValueError(f"the field {name!r} holds {type(value).__name__}: cached fields are int, str or lists of str.")


@dataclass(frozen=True)
class _Batch:
    """Rows with their samples (None: a broken image) for one shard; after `is_last` the stream's group has no row."""

    key: tuple[int, ...]
    samples: list[tuple[int, dict | None]]
    is_last: bool


class _Rows(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, row: int) -> dict | None:
        return read_sample(self.dataset, row)


__all__ = ["CacheRequest", "ShardFormat", "find_shard_damage", "read_info", "whole_shards", "write_cache"]
