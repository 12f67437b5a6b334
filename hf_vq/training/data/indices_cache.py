"""The indices of a whole data set, computed once, for a prior to train on.

```python
write_indices(tokenizer, load_image_dataset(data, "train"), "outputs/indices/train", flip=True)
dataset = load_indices("outputs/indices/train", tokenizer=tokenizer, random_flip=True)
dataset[0]  # {"indices": int64 (h, w), "label": int}
```

With conditions, `condition_codes` stands beside `indices`, and both are mirrored together.

The folder holds parquet shards, which `datasets.load_dataset("parquet", data_dir=...)` opens as well, and
`config.json`. Images are read and rows are written shard by shard, so memory does not grow with the data set; under
`accelerate launch` every process writes its own shards. A shard appears complete or not at all, and a second call goes
on with those that are missing. `config.json` says which tokenizer and which images the indices belong to: others are
refused.
"""

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ...distributed import is_distributed
from ...evaluation.evaluate import evaluation_mode
from ...models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from ..checkpointing import flush_file, preserved_random_state, remove_unfinished, write_file_atomically
from .cache_identity import (
    StaleIndicesError,
    cache_lock,
    images_fingerprint,
    read_sample,
    tokenizer_fingerprint,
)
from .columns import draw_caption
from .conditions import condition_values
from .streaming import StreamingImageDataset


logger = logging.getLogger(__name__)

_LAYOUT = 2  # of the folder; raised when it changes
CONDITION_CODES = "condition_codes"


def write_indices(
    tokenizer: nn.Module,
    dataset: Dataset,
    path: str | Path,
    flip: bool = False,
    batch_size: int = 64,
    rows_per_shard: int = 16384,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    condition_tokenizer: nn.Module | None = None,
    condition_processor: VQConditionProcessor | None = None,
) -> Path:
    """Writes the indices of every image, or what is missing of them; called by every process.

    Args:
        tokenizer (`nn.Module`): has `config` and `encode(pixel_values).indices`; it is used in eval mode.
        dataset: `ImageDataset` or `StreamingImageDataset` (their centre crops are taken), or any map-style data set of
            dicts with `pixel_values`. Broken images get no row; their number is written in `config.json`.
        path (`str` or `Path`): the folder.
        flip (`bool`): also the indices of the mirrored images, in a second column.
        batch_size (`int`): images that are encoded at a time.
        rows_per_shard (`int`): images per parquet file.
        num_workers (`int`): processes that read images ahead (map-style data only).
        overwrite (`bool`): replace indices of another tokenizer or other images.
        condition_tokenizer, condition_processor (*optional*): also the codes of each sample's `condition`, in the
            column `condition_codes`, by the tokenizer and the processor beside it.

    Raises:
        StaleIndicesError: the folder holds other indices, and `overwrite` is not set.
    """
    path = Path(path)
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    wanted = {
        "layout": _LAYOUT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "images": images_fingerprint(dataset),
        "flip": flip,
        "rows_per_shard": rows_per_shard,
    }
    if condition_tokenizer is not None:
        wanted["condition_tokenizer"] = tokenizer_fingerprint(condition_tokenizer)
        wanted["condition_processor"] = json.loads(json.dumps(condition_processor.to_dict()))  # as it is read again
    encoder = PairEncoder(tokenizer, flip, condition_tokenizer, condition_processor)
    with cache_lock(path, is_writer=rank == 0):
        _barrier()  # the main process has the lock
        known = _read_info(path)
        stale = _differences(known, wanted) if known is not None else []
        if stale and not overwrite:
            raise StaleIndicesError(
                f"the indices in {path} differ in {', '.join(stale)} from what is asked for: give another folder, or "
                "overwrite=True to replace them."
            )
        _barrier()  # all processes have read config.json before the main process changes it
        if rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path)
            complete = _remove_damaged(path, wanted, known) and not stale
            if not complete:
                write_file_atomically(path / "config.json", json.dumps({**wanted, "complete": False}, indent=1))
        _barrier()
        known = _read_info(path)
        if known is None or not known["complete"]:
            plan = _Plan(set(_shards(path)), rank, world, rows_per_shard, batch_size)
            _write_missing(encoder, dataset, path, wanted, plan, num_workers, progress)
        _barrier()
    return path


def _write_missing(
    encoder: "PairEncoder", dataset, path: Path, wanted: dict, plan: "_Plan", num_workers: int, progress: bool
) -> None:
    # a run that finds its cache goes on with the same random numbers as one that has to write it
    with evaluation_mode(encoder), preserved_random_state():
        writer = _ShardWriter(encoder, dataset, path, wanted)
        writer.write_all(plan, num_workers, show_progress=progress and plan.rank == 0)
    _barrier()
    if plan.rank == 0:
        write_file_atomically(path / "config.json", json.dumps({**wanted, **writer.summary()}, indent=1))


def _damage(shard: Path, identity: dict | None = None) -> str | None:
    """Why a shard cannot be used: it cannot be read, fails the checksums of its pages, or has another identity."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            found = json.loads((file.schema_arrow.metadata or {}).get(b"identity", b"null"))
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (OSError, ValueError, pa.ArrowException) as error:
        return str(error).splitlines()[0]
    return None if identity is None or found == identity else "it holds other indices"


def _remove_damaged(path: Path, wanted: dict, known: dict | None) -> bool:
    """Removes shards that are damaged or belong to other codes, each named; whether the cache is complete without
    them.
    """
    import pyarrow.parquet as pq

    rows = {}
    for number, shard in _shards(path).items():
        damage = _damage(shard, wanted)
        if damage is None:
            rows[number] = pq.read_metadata(shard).num_rows
        else:
            logger.warning("Writing %s again: %s.", shard, damage)
            shard.unlink()
    if known is None or not known.get("complete"):
        return False
    missing = sorted(set(range(known["shards"])) - set(rows))
    for number in missing:
        logger.warning("Writing %s again: it is missing.", _shard_path(path, number))
    return not missing and sum(rows.values()) == known["rows"]


@dataclass
class _Plan:
    """Which shards one process writes: every `world`-th, without those that are there."""

    finished: set[int]
    rank: int
    world: int
    rows_per_shard: int
    batch_size: int

    def is_mine(self, shard: int) -> bool:
        return shard % self.world == self.rank and shard not in self.finished

    def shards(self, rows: int) -> list[int]:
        return [shard for shard in range(-(-rows // self.rows_per_shard)) if self.is_mine(shard)]


class PairEncoder(nn.Module):
    """The columns of codes of a batch: of the images, of their conditions, and of both mirrored.

    Args:
        tokenizer, condition_tokenizer: have `config` and `encode(pixel_values).indices`.
        flip: also the codes of the mirrored images.
        condition_processor: see `condition_values`.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        flip: bool,
        condition_tokenizer: nn.Module | None = None,
        condition_processor: VQConditionProcessor | None = None,
    ):
        super().__init__()
        self.tokenizer, self.condition_tokenizer = tokenizer, condition_tokenizer
        self.flip, self.condition_processor = flip, condition_processor

    @torch.no_grad()
    def forward(self, samples: list[dict]) -> dict[str, np.ndarray]:
        """`indices`, or `indices_0`, ... where the tokenizer has levels, top first; `condition_codes`; those
        `_flipped`.
        """
        columns = _codes_of(self.tokenizer, torch.stack([s["pixel_values"] for s in samples]), "indices", self.flip)
        if self.condition_tokenizer is not None:
            if "condition" not in samples[0]:
                raise ValueError("`dataset` must have conditions: load it with `condition_processor`.")
            conditions = torch.stack([sample["condition"] for sample in samples])
            values = condition_values(conditions, self.condition_processor)
            columns |= _codes_of(self.condition_tokenizer, values, CONDITION_CODES, self.flip)
        return columns


def _codes_of(tokenizer, pixel_values: torch.Tensor, name: str, flip: bool) -> dict[str, np.ndarray]:
    columns = {}
    codebook_size = int(tokenizer.config.num_embeddings)
    device = next(tokenizer.parameters()).device
    for suffix in ("", "_flipped") if flip else ("",):
        images = pixel_values.flip(-1) if suffix else pixel_values
        indices = tokenizer.encode(images.to(device)).indices
        levels = {name: indices}
        if isinstance(indices, (tuple, list)):
            levels = {f"{name}_{level}": values for level, values in enumerate(indices)}
        for column, values in levels.items():
            if values.min() < 0 or values.max() >= codebook_size:
                raise ValueError(
                    f"the tokenizer gave indices from {values.min()} to {values.max()}, but its config says "
                    f"num_embeddings={codebook_size}."
                )
            columns[column + suffix] = values.cpu().numpy().astype(smallest_dtype(codebook_size))
    return columns


class _ShardWriter:
    """Encodes images and writes parquet shards `indices-<number>.parquet`."""

    def __init__(self, encoder: PairEncoder, dataset, path: Path, wanted: dict):
        self.encoder = encoder
        self.dataset = dataset
        self.path = path
        self.identity = wanted
        self.codebook_size = int(encoder.tokenizer.config.num_embeddings)
        self.rows_read: int | None = None
        first = _first_readable(dataset)
        encoded = encoder([first])
        self.grids = {name: list(indices.shape[1:]) for name, indices in encoded.items()}
        self.dtypes = {name: indices.dtype for name, indices in encoded.items()}
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
            elif name not in ("pixel_values", "condition"):
                kind = (
                    "int64" if isinstance(value, (int, np.integer)) else "string" if isinstance(value, str) else None
                )
                if kind is None:
                    raise ValueError(f"the field {name!r} holds {type(value).__name__}: cached fields are int or str.")
                features[name] = datasets.Value(kind)
        return datasets.Features(features)

    def write_all(self, plan: _Plan, num_workers: int, show_progress: bool) -> None:
        from tqdm.auto import tqdm

        if isinstance(self.dataset, StreamingImageDataset):
            batches = self._stream_batches(plan)
            total = None
        else:
            self.rows_read = len(self.dataset)
            batches = _map_batches(self.dataset, plan, num_workers)
            total = sum(
                min(plan.rows_per_shard, self.rows_read - shard * plan.rows_per_shard)
                for shard in plan.shards(self.rows_read)
            )
        with tqdm(total=total, unit="image", desc="indices", disable=not show_progress, mininterval=1.0) as bar:
            for shard, group in itertools.groupby(batches, key=lambda pair: pair[0]):
                self._write_shard(shard, (batch for _, batch in group), bar)

    def _stream_batches(self, plan: _Plan) -> Iterator[tuple[int, list]]:
        """Reads the whole stream, but decodes only the rows of this process's shards."""
        shard, batch = 0, []
        self.rows_read = 0
        for row, example in enumerate(self.dataset.rows):
            self.rows_read += 1
            if batch and (row % plan.rows_per_shard == 0 or len(batch) == plan.batch_size):
                yield shard, batch
                batch = []
            shard = row // plan.rows_per_shard
            if plan.is_mine(shard):
                batch.append((row, self.dataset.read(example, f"row {row}")))
        if batch:
            yield shard, batch

    def _write_shard(self, shard: int, batches: Iterator[list], bar) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, list] = {name: [] for name in self.features}
        broken = []
        for batch in batches:
            broken += [row for row, sample in batch if sample is None]
            samples = [sample for _, sample in batch if sample is not None]
            if samples:
                for name, values in self.encoder(samples).items():
                    columns[name].append(values.reshape(len(samples), -1))
                for name in columns.keys() - self.grids.keys():
                    columns[name] += [sample[name] for sample in samples]
            bar.update(len(batch))
        schema = self.features.arrow_schema
        own = {b"broken_rows": json.dumps(broken).encode(), b"identity": json.dumps(self.identity).encode()}
        schema = schema.with_metadata({**schema.metadata, **own})
        arrays = []
        for name in self.features:
            if name in self.grids:
                length = int(np.prod(self.grids[name]))
                flat = np.concatenate(columns[name]).reshape(-1) if columns[name] else np.empty(0, self.dtypes[name])
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), length))
            else:
                arrays.append(pa.array(columns[name], type=schema.field(name).type))
        draft = self.path / f".unfinished-{shard:05d}.parquet"
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), draft, write_page_checksum=True)
        flush_file(draft)
        draft.rename(_shard_path(self.path, shard))
        flush_file(self.path)

    def summary(self) -> dict:
        """What `config.json` says of a complete cache."""
        import pyarrow.parquet as pq

        shards = _shards(self.path)
        metadata = [pq.read_metadata(path) for path in shards.values()]
        broken = [row for item in metadata for row in json.loads(item.metadata[b"broken_rows"])]
        rows = sum(item.num_rows for item in metadata)
        if rows + len(broken) != self.rows_read or list(shards) != list(range(len(shards))):
            raise RuntimeError(
                f"{self.path} has {rows} rows and {len(broken)} broken images in {len(shards)} shards, but "
                f"{self.rows_read} images were read: a process has not written its part."
            )
        return {
            "complete": True,
            "rows": rows,
            "shards": len(shards),
            "broken_rows": broken,
            "grids": self.grids,
            "codebook_size": self.codebook_size,
        }


def _map_batches(dataset, plan: _Plan, num_workers: int) -> Iterator[tuple[int, list]]:
    batches = []
    for shard in plan.shards(len(dataset)):
        first = shard * plan.rows_per_shard
        last = min(first + plan.rows_per_shard, len(dataset))
        batches += [
            (shard, range(start, min(start + plan.batch_size, last))) for start in range(first, last, plan.batch_size)
        ]
    loader = DataLoader(
        _NumberedRows(dataset), batch_sampler=[rows for _, rows in batches], num_workers=num_workers, collate_fn=list
    )
    yield from zip((shard for shard, _ in batches), loader, strict=True)


class _NumberedRows(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, row: int) -> tuple[int, dict | None]:
        return row, read_sample(self.dataset, row)


def _first_readable(dataset) -> dict:
    samples = (
        iter(dataset)
        if isinstance(dataset, StreamingImageDataset)
        else (read_sample(dataset, row) for row in range(len(dataset)))
    )
    for sample in samples:
        if sample is not None:
            return sample
    raise ValueError("the data set has no image that can be read.")


def smallest_dtype(codebook_size: int) -> np.dtype:
    """The smallest integer type that holds `0 ... codebook_size - 1`."""
    return np.dtype(
        next(kind for kind in ("uint8", "uint16", "int32", "int64") if codebook_size - 1 <= np.iinfo(kind).max)
    )


def _shard_path(path: Path, number: int) -> Path:
    return path / f"indices-{number:05d}.parquet"


def _shards(path: Path) -> dict[int, Path]:
    return {int(file.stem.split("-")[1]): file for file in sorted(path.glob("indices-*.parquet"))}


def _read_info(path: Path) -> dict | None:
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


def _differences(known: dict, wanted: dict) -> list[str]:
    return [name for name, value in wanted.items() if known.get(name) != value]


def _barrier() -> None:
    if is_distributed():
        dist.barrier()


def load_indices(
    path: str | Path,
    tokenizer: nn.Module | None = None,
    random_flip: bool = False,
    seed: int = 0,
    in_memory: bool = True,
    caption_column: str | None = None,
    condition_tokenizer: nn.Module | None = None,
) -> "IndicesDataset":
    """Opens what `write_indices` has written.

    Args:
        path (`str` or `Path`): the folder.
        tokenizer, condition_tokenizer (`nn.Module`, *optional*): refuse indices of any others.
        random_flip (`bool`): in half of the cases give the indices of the mirrored image, drawn from
            `(seed, epoch, row)`; needs a cache written with `flip=True`.
        in_memory (`bool`): hold the indices in memory, in their small type; otherwise rows are read from the disk.
        caption_column (`str`, *optional*): of several captions in it, give one, drawn from `(seed, epoch, row)`.

    Raises:
        StaleIndicesError: the indices are another tokenizer's.
        ValueError: there are no indices, or not all of them.
    """
    path = Path(path)
    info = _read_info(path)
    if info is None:
        raise ValueError(f"{path} holds no cached indices: write them with write_indices.")
    if not info["complete"]:
        raise ValueError(f"the indices in {path} are not complete: call write_indices again, it goes on where it was.")
    for name, given in (("tokenizer", tokenizer), ("condition_tokenizer", condition_tokenizer)):
        if given is not None and info.get(name) != tokenizer_fingerprint(given):
            raise StaleIndicesError(
                f"the indices in {path} were computed with another {name} than the one given: write them again, with "
                "overwrite=True or in another folder."
            )
    if random_flip and not info["flip"]:
        raise ValueError(f"random_flip=True needs mirrored indices: {path} was written with flip=False.")
    shards = _shards(path)
    missing = [_shard_path(path, number).name for number in range(info["shards"]) if number not in shards]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: call write_indices again, it writes what is missing.")
    for shard in shards.values():
        damage = _damage(shard)
        if damage is not None:
            raise ValueError(f"{shard} is damaged ({damage}): call write_indices again, which replaces it.")
    files = [str(shard) for shard in shards.values()]
    return IndicesDataset(files, info, random_flip, seed, in_memory, caption_column)


class IndicesDataset(Dataset):
    """Cached indices. See `load_indices`.

    Attributes:
        codebook_size (`int`): indices lie below it.
        grids (`dict[str, list[int]]`): the shape of each column of indices: `{"indices": [h, w]}`, and with conditions
            `condition_codes`.
        labels (`np.ndarray` or `None`): all labels.
        class_names (`list[str]` or `None`): names of the labels.
    """

    def __init__(
        self,
        files: list[str],
        info: dict,
        random_flip: bool,
        seed: int,
        in_memory: bool,
        caption_column: str | None = None,
    ):
        import datasets

        rows = datasets.Dataset.from_parquet(files)
        if len(rows) != info["rows"]:
            raise ValueError(
                f"{Path(files[0]).parent} holds {len(rows)} rows in place of {info['rows']}: call write_indices again."
            )
        self.info = info
        self.codebook_size = info["codebook_size"]
        self.grids = {name: grid for name, grid in info["grids"].items() if not name.endswith("_flipped")}
        self.random_flip = random_flip
        self.seed = seed
        self.caption_column = caption_column
        label = rows.features.get("label")
        self.labels = np.asarray(rows["label"][:]) if label is not None else None
        self.class_names = list(label.names) if isinstance(label, datasets.ClassLabel) else None
        others = [name for name in rows.column_names if name not in info["grids"] and name != "label"]
        self._others = rows.select_columns(others) if others else None
        self._length = len(rows)
        self._rows = rows.select_columns(list(info["grids"])).with_format("numpy")
        self._arrays = {name: self._rows[name][:] for name in info["grids"]} if in_memory else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> dict:
        """`indices`, `condition_codes` (int64, in the shapes of their grids), `label` (`int`) if there are labels,
        and the other columns.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: there are the rows 0 to {len(self) - 1}.")
        mirrored = self.random_flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        suffix = "_flipped" if mirrored else ""
        row = self._rows[index] if self._arrays is None else {name: v[index] for name, v in self._arrays.items()}
        sample = {
            name: torch.from_numpy(row[name + suffix].astype(np.int64)).reshape(grid)
            for name, grid in self.grids.items()
        }
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        sample |= self._others[index] if self._others is not None else {}
        if self.caption_column is not None:
            sample[self.caption_column] = draw_caption(sample[self.caption_column], self.seed, epoch, index)
        return sample
