"""The indices of a whole data set, computed once, for a prior to train on.

```python
write_indices(tokenizer, load_image_dataset(data, "train"), "outputs/indices/train", flip=True)
dataset = load_indices("outputs/indices/train", tokenizer=tokenizer, random_flip=True)
dataset[0]  # {"indices": int64 (h, w), "label": int}
```

With conditions, `condition_codes` stands beside `indices`, and both are mirrored together. A sample that has
`condition_codes` already, such as those of `CoordinateCrops`, keeps them.

The folder holds parquet shards, which `datasets.load_dataset("parquet", data_dir=...)` opens as well, and
`config.json`. Images are read and rows are written shard by shard, so memory does not grow with the data set; under
`accelerate launch` every process writes its own shards. A shard appears complete or not at all, and a second call goes
on with those that are missing. `config.json` says which tokenizer and which images the indices belong to: others are
refused.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ...models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from .cache_identity import StaleIndicesError, tokenizer_fingerprint
from .columns import draw_caption
from .conditions import condition_values
from .shard_cache import CacheRequest, ShardFormat, whole_shards, write_cache


if TYPE_CHECKING:
    import pyarrow as pa

_LAYOUT = 3  # of the folder; raised when it changes
CONDITION_CODES = "condition_codes"


def _write_parquet(table: "pa.Table", file: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, file)


def _read_parquet(file: Path) -> "pa.Table":
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read()


def _read_parquet_schema(file: Path) -> "pa.Schema":
    import pyarrow.parquet as pq

    return pq.read_schema(file)


_FORMAT = ShardFormat("indices", "parquet", _write_parquet, _read_parquet, _read_parquet_schema, is_compressed=True)


def write_indices(
    tokenizer: nn.Module,
    dataset: Dataset,
    path: str | Path,
    flip: bool = False,
    batch_size: int = 64,
    rows_per_shard: int | None = None,
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
        rows_per_shard (`int`, *optional*): images per parquet file; by default up to 4096, see `CacheRequest`.
        num_workers (`int`): processes that read images ahead (map-style data only).
        overwrite (`bool`): replace indices of another tokenizer or other images.
        condition_tokenizer, condition_processor (*optional*): also the codes of each sample's `condition`, in the
            column `condition_codes`, by the tokenizer and the processor beside it.

    Raises:
        StaleIndicesError: the folder holds other indices, and `overwrite` is not set.
    """
    path = Path(path)
    identity = {"layout": _LAYOUT, "tokenizer": tokenizer_fingerprint(tokenizer), "flip": flip}
    if condition_tokenizer is not None:
        identity["condition_tokenizer"] = tokenizer_fingerprint(condition_tokenizer)
        identity["condition_processor"] = json.loads(json.dumps(condition_processor.to_dict()))  # as it is read again
    request = CacheRequest(
        _FORMAT,
        PairEncoder(tokenizer, flip, condition_tokenizer, condition_processor),
        dataset,
        identity,
        {"codebook_size": int(tokenizer.config.num_embeddings)},
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        num_workers=num_workers,
        progress=progress,
    )
    write_cache(request, path, overwrite)
    return path


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
        elif CONDITION_CODES in samples[0]:
            for name in (CONDITION_CODES, f"{CONDITION_CODES}_flipped")[: 2 if self.flip else 1]:
                columns[name] = np.stack([sample[name].numpy().astype(np.int32) for sample in samples])
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


def smallest_dtype(codebook_size: int) -> np.dtype:
    """The smallest integer type that holds `0 ... codebook_size - 1`."""
    return np.dtype(
        next(kind for kind in ("uint8", "uint16", "int32", "int64") if codebook_size - 1 <= np.iinfo(kind).max)
    )


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
    info, files = whole_shards(_FORMAT, path, "write_indices")
    for name, given in (("tokenizer", tokenizer), ("condition_tokenizer", condition_tokenizer)):
        if given is not None and info.get(name) != tokenizer_fingerprint(given):
            raise StaleIndicesError(
                f"the indices in {path} were computed with another {name} than the one given: write them again, with "
                "overwrite=True or in another folder."
            )
    if random_flip and not info["flip"]:
        raise ValueError(f"random_flip=True needs mirrored indices: {path} was written with flip=False.")
    return IndicesDataset([str(file) for file in files], info, random_flip, seed, in_memory, caption_column)


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
